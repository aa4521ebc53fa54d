"""What one row of a benchmark asks of every contender: a call of ``generate``, or of an encoder."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

SEED = 0
TOP_K = 50
TOP_P = 0.9


@dataclass(frozen=True)
class Workload:
    """One ``generate`` call: ``batch`` prompts of ``prompt_tokens`` ids, ``new_tokens`` ids each.

    Every contender generates exactly ``new_tokens`` tokens: its end-of-sequence id is set to
    ``vocab_size``, one past the last id, so that all of them make the usual end-of-sequence test
    on every token, and none stops early or runs an additional logits processor to prevent it.

    Raises:
        ValueError: a size is below 1, or beams are combined with sampling.
    """

    batch: int = 1
    prompt_tokens: int = 32
    new_tokens: int = 64
    beams: int = 1
    sample: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "new_tokens", "beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.sample and self.beams > 1:
            raise ValueError(
                f"sample=True with beams={self.beams}: CTranslate2 has no beam sampling to compare "
                "with. Leave out one of the two."
            )

    @property
    def title(self) -> str:
        """For people: ``4 beams, batch 16, prompt 512, 64 new tokens``."""
        method = f"sampling top-k {TOP_K} top-p {TOP_P}" if self.sample else "greedy"
        if self.beams > 1:
            method = f"{self.beams} beams"
        return (
            f"{method}, batch {self.batch}, prompt {self.prompt_tokens}, "
            f"{self.new_tokens} new tokens"
        )

    def first_token(self) -> "Workload":
        """The same call stopped after its first token: what time to first token measures."""
        return replace(self, new_tokens=1)

    def prompts(self, vocab_size: int) -> torch.Tensor:
        """Random ids, the same in every process: int64 ``[batch, prompt_tokens]``, on the CPU."""
        return _random_ids(vocab_size, self.batch, self.prompt_tokens)

    def generate_kwargs(self, vocab_size: int) -> dict[str, Any]:
        """Arguments of Hugging Face's ``generate`` beside the prompts."""
        kwargs: dict[str, Any] = {
            "max_new_tokens": self.new_tokens,
            "eos_token_id": vocab_size,
            "num_beams": self.beams,
            "do_sample": self.sample,
        }
        if self.sample:
            kwargs |= {"top_k": TOP_K, "top_p": TOP_P}
        return kwargs

    def as_dict(self) -> dict[str, Any]:
        """Field values, for JSON; ``workload_from(workload.as_dict())`` is equal."""
        return asdict(self)


@dataclass(frozen=True)
class Encoding:
    """One call of an encoder: ``batch`` rows of up to ``prompt_tokens`` ids.

    Raises:
        ValueError: a size is below 1.
    """

    batch: int = 1
    prompt_tokens: int = 128
    ragged: bool = False
    """Rows of other lengths, padded: drawn between an eighth of ``prompt_tokens`` and all of it,
    the first one full."""

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")

    @property
    def title(self) -> str:
        """For people: ``64 x 128 tokens`` or ``64 rows of 16 to 128 tokens``."""
        if self.ragged:
            return f"{self.batch} rows of {self._shortest} to {self.prompt_tokens} tokens"
        return f"{self.batch} x {self.prompt_tokens} tokens"

    @property
    def _shortest(self) -> int:
        return max(1, self.prompt_tokens // 8)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, the same in every process."""
        if not self.ragged:
            return [self.prompt_tokens] * self.batch
        generator = torch.Generator().manual_seed(SEED)
        drawn = torch.randint(
            self._shortest, self.prompt_tokens + 1, (self.batch,), generator=generator
        )
        return [self.prompt_tokens, *drawn.tolist()[1:]]

    def tokens(self, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random ids, 0 where the mask is, and the mask: int64 ``[batch, prompt_tokens]``, on the
        CPU, the same in every process."""
        lengths = torch.tensor(self.lengths)[:, None]
        mask = (torch.arange(self.prompt_tokens) < lengths).to(torch.int64)
        return _random_ids(vocab_size, self.batch, self.prompt_tokens) * mask, mask

    def as_dict(self) -> dict[str, Any]:
        """As ``Workload.as_dict``."""
        return asdict(self)


AnyWorkload = Workload | Encoding


def workload_from(fields: dict[str, Any]) -> AnyWorkload:
    """The workload whose ``as_dict`` gave these fields."""
    return (Encoding if "ragged" in fields else Workload)(**fields)


def encoder_grid() -> list[Encoding]:
    """A short text, texts of a batch full and ragged, a prompt of an image model, a long text."""
    return [
        Encoding(1, 77),
        Encoding(1, 128),
        Encoding(8, 128, ragged=True),
        Encoding(64, 128),
        Encoding(64, 128, ragged=True),
        Encoding(1, 512),
    ]


def _random_ids(vocab_size: int, rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    # Ids 0 to 2 are T5's padding, end and unknown tokens.
    return torch.randint(3, vocab_size, (rows, tokens), generator=generator)


def standard_grid(new_tokens: int = 64) -> list[Workload]:
    """The five rows of the project's performance table."""
    return [
        Workload(new_tokens=new_tokens),
        Workload(batch=16, prompt_tokens=512, new_tokens=new_tokens),
        Workload(new_tokens=new_tokens, sample=True),
        Workload(new_tokens=new_tokens, beams=4),
        Workload(batch=16, prompt_tokens=512, new_tokens=new_tokens, beams=4),
    ]
