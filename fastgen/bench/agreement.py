"""How far a contender's results are from the stock class's, in the same dtype."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

_CLOSE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """Where a contender's tokens leave the stock class's."""

    first_difference: list[int | None]
    """Per row, the index of the first other new token; None if the row is equal."""

    @classmethod
    def of(cls, tokens: list[list[int]], reference: list[list[int]]) -> "Agreement":
        """Compare new ids row by row; a row that is only longer or shorter also differs."""
        return cls([_first_difference(*rows) for rows in zip(tokens, reference, strict=True)])

    @property
    def equal(self) -> bool:
        return all(index is None for index in self.first_difference)

    @property
    def summary(self) -> str:
        """For a table: ``equal`` or ``14 of 16 rows``."""
        rows = len(self.first_difference)
        return "equal" if self.equal else f"{self.first_difference.count(None)} of {rows} rows"

    def __str__(self) -> str:
        differences = ", ".join(
            f"row {row} from new token {index}"
            for row, index in enumerate(self.first_difference)
            if index is not None
        )
        return (
            f"{self.summary} equal to hf; others: {differences}" if differences else "equal to hf"
        )

    def as_json(self) -> list[int | None]:
        """``first_difference``."""
        return self.first_difference


@dataclass(frozen=True)
class Distance:
    """How far a contender's hidden states are from the stock class's, at real tokens."""

    largest: float
    """The largest difference of one element."""
    scale: float
    """The largest element of the stock class's."""

    @classmethod
    def of(cls, hidden: torch.Tensor, reference: torch.Tensor) -> "Distance":
        """Of hidden states [T, E]."""
        return cls(float((hidden - reference).abs().max()), float(reference.abs().max()))

    @property
    def equal(self) -> bool:
        """Whether they differ by what fp32 rounds: no more than 1e-4 of the largest element."""
        return self.largest <= _CLOSE * max(self.scale, 1.0)

    @property
    def summary(self) -> str:
        """For a table: ``1.2e-06``."""
        return f"{self.largest:.1e}"

    def __str__(self) -> str:
        return f"hidden states up to {self.scale:.2g} differ from hf's by {self.largest:.2g}"

    def as_json(self) -> dict[str, Any]:
        """Both numbers by name."""
        return {"largest": self.largest, "scale": self.scale}


def agreement(result: Any, reference: Any) -> Agreement | Distance:
    """Compare what ``Contender.result`` gave with what the stock class's gave."""
    if isinstance(result, torch.Tensor):
        return Distance.of(result, reference)
    return Agreement.of(result, reference)


def _first_difference(row: list[int], reference: list[int]) -> int | None:
    for index, (token, expected) in enumerate(itertools.zip_longest(row, reference)):
        if token != expected:
            return index
    return None
