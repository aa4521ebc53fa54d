"""The pronouncer: symbols, split, scoring, and a training run of a few steps."""

import lzma
import sys
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from examples.pronounce import train
from examples.pronounce.data import (
    PHONEMES,
    SYMBOLS,
    Entry,
    decode_phonemes,
    encode_phonemes,
    is_held_out,
    read_lexicon,
    score,
    split,
)
from examples.pronounce.inference import load

LINES = """\
hello HH AH0 L OW1
hello(2) HH EH0 L OW1
dogs D AO1 G Z # plural
dog's D AO1 G Z
'bout B AW1 T
a42128 EY1 F AO1 R
"""


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    path = tmp_path / "cmudict.txt"
    path.write_text(LINES)
    return path


def test_every_phoneme_is_one_token_of_its_own() -> None:
    assert len(SYMBOLS) == len(PHONEMES) == 24 + 15 * 3
    pronunciation = " ".join(SYMBOLS)
    tokens = ByT5Tokenizer()(encode_phonemes(pronunciation)).input_ids
    assert len(tokens) == len(SYMBOLS) + 1  # and the end token
    assert decode_phonemes(ByT5Tokenizer().decode(tokens[:-1])) == pronunciation


def test_unknown_phoneme_is_named() -> None:
    with pytest.raises(ValueError, match="'OW' in 'HH OW'"):
        encode_phonemes("HH OW")


def test_unknown_symbol_is_a_question_mark() -> None:
    assert decode_phonemes(encode_phonemes("B AA1") + "<") == "B AA1 ?"


def test_lexicon_gathers_variants_and_leaves_odd_words_out(dictionary: Path) -> None:
    assert read_lexicon(dictionary) == [
        Entry("hello", ("HH AH0 L OW1", "HH EH0 L OW1")),
        Entry("dogs", ("D AO1 G Z",)),
        Entry("dog's", ("D AO1 G Z",)),
    ]


def test_compressed_lexicon_reads_the_same(dictionary: Path) -> None:
    packed = dictionary.with_suffix(".xz")
    packed.write_bytes(lzma.compress(dictionary.read_bytes()))
    assert read_lexicon(packed) == read_lexicon(dictionary)


def test_empty_lexicon_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("42 F AO1 R\n")
    with pytest.raises(ValueError, match="no usable entry"):
        read_lexicon(empty)


def test_split_is_a_tenth_and_keeps_possessives_together() -> None:
    entries = [Entry(f"{a}{b}{c}", ("B",)) for a in "abcdefgh" for b in "aeiou" for c in "klmnopqr"]
    learn, held_out = split(entries)
    assert sorted(e.word for e in learn + held_out) == sorted(e.word for e in entries)
    assert 0.05 < len(held_out) / len(entries) < 0.15
    assert all(is_held_out(e.word + "'s") == is_held_out(e.word + "s") for e in entries)


def test_score_tells_any_from_first_and_stress_from_none() -> None:
    entry = Entry("hello", ("HH AH0 L OW1", "HH EH0 L OW1"))
    predictions = ["HH AH0 L OW1", "HH EH0 L OW1", "HH EH1 L OW0", "HH L OW1"]
    result = score(predictions, [entry] * 4)
    assert (result.first_listed, result.any_listed, result.any_without_stress) == (0.25, 0.5, 0.75)
    with pytest.raises(ValueError, match="1 predictions for 2 entries"):
        score(["HH"], [entry] * 2)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [train.learning_rate(progress / 100, 1.0) for progress in range(101)]
    assert rates[0] == 0
    assert max(rates) == max(rates[: int(200 * train.WARMUP)])
    assert rates[-1] == pytest.approx(0)


def test_step_learns_and_saved_model_is_the_same_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    entries = [Entry("hello", ("HH AH0 L OW1",)), Entry("dogs", ("D AO1 G Z",))]
    model = train.build_model(dropout=0.0)
    inputs, labels = train.encode(entries, "cpu")
    step = train.eager_step(model, smoothing=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        losses.append(step(inputs, labels).item())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]

    train.save(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    saved = load(tmp_path, fast=False)
    assert saved.dtype == torch.float32
    for name, value in model.state_dict().items():  # rounded to bf16 by save
        assert torch.equal(saved.state_dict()[name], value.float()), name


def test_batch_larger_than_the_data_is_refused() -> None:
    words = torch.zeros(3, 24, dtype=torch.long)
    with pytest.raises(ValueError, match="batch size 4: give at most the 3"):
        next(train.batches(words, words, 4))


def test_command_line_refuses_two_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--out", "x", "--minutes", "1", "--steps", "2"])
    with pytest.raises(SystemExit):
        train.parse()
