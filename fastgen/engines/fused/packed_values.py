"""What an encoder over packed tokens works with: calls, scratch, and the parts of its kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.functional import layer_norm, rms_norm

from fastgen import cuda

VECTOR = 8  # elements of one load, where widths and addresses allow it
THREADS = 256
MAX_TERMS = 4
LARGEST = 127.0  # of 8-bit integers, as they are used
FINER = 254.0  # times as fine are the steps of what rounding takes away


@dataclass(eq=False)
class Buffer:
    """Scratch of one row a token, [capacity, width]; several share memory where they can."""

    width: int
    tensor: Any = None
    made: bool = False
    """Whether the launch that writes it makes its memory, too."""
    dtype: torch.dtype | None = None
    """None: that of activations."""
    plain: bool = True
    """Whether somebody reads its rows as they are."""
    rounded: "Rounded | None" = None
    """The same rows as 8-bit integers, where somebody reads those."""
    _rows: Any = None

    def rows(self, count: int) -> torch.Tensor:
        """Its first rows; kept, as calls of a size often follow each other."""
        if self.made or len(self.tensor) == count:
            found: torch.Tensor = self.tensor
            return found
        if self._rows is None or len(self._rows) != count:
            self._rows = self.tensor[:count]
        found = self._rows
        return found


class Rounded:
    """Rows as 8-bit integers, which stand for themselves times a step of each row."""

    def __init__(self, width: int, step: float | None = None, split: bool = False) -> None:
        """
        Args:
            step: of all rows, known beforehand; None: each has its own.
            split: keep what rounding takes away, as integers of finer steps.
        """
        self.width, self.step = width, step
        self.values = Buffer(width, dtype=torch.int8)
        self.steps = Buffer(1, dtype=torch.float32)
        self.rest = Rounded(width) if split else None

    @property
    def buffers(self) -> list[Buffer]:
        """What a kernel leaves."""
        own = [self.values] if self.step is not None else [self.values, self.steps]
        return own if self.rest is None else [*own, *self.rest.buffers]

    @classmethod
    def on(
        cls, device: torch.device, width: int, step: float | None = None, split: bool = False
    ) -> "Rounded":
        """The same, with a step that is known beforehand where kernels read it."""
        rounded = cls(width, step, split)
        if step is not None:
            rounded.steps.tensor = torch.full((1, 1), step, device=device)
        return rounded

    def fill(self, x: torch.Tensor) -> None:
        """What the kernels compute of rows in float32: the first ones."""
        if self.step is None:
            most = x.abs().amax(1, keepdim=True)
            factor = torch.where(most > 0, LARGEST / most, 0.0)
            self.steps.tensor[: len(x)] = most / LARGEST
        else:
            factor = torch.full((1, 1), 1 / self.step, device=x.device)
        scaled = x * factor
        values = scaled.round().clamp(-LARGEST, LARGEST)
        self.values.tensor[: len(x)] = values.to(torch.int8)
        if self.rest is not None:
            finer = ((scaled - values) * FINER).round().clamp(-LARGEST, LARGEST)
            self.rest.values.tensor[: len(x)] = finer.to(torch.int8)
            self.rest.steps.tensor[: len(x)] = self.steps.tensor[: len(x)] / FINER


@dataclass(frozen=True, eq=False)
class Call:
    """What one run over rows [B, S] reads and writes, on the device."""

    ids: Mapping[str, torch.Tensor | None]
    """int64 [B, S] each; None: zeros."""
    mask: torch.Tensor | None
    """int64 [B, S], 0 hides a token from queries; None: all are visible."""
    hidden: torch.Tensor
    """[B, S, E], what is computed."""
    lengths: torch.Tensor
    """int32 [B], tokens of each row that are computed."""
    visible: torch.Tensor
    """int32 [B], of these what queries see."""
    tokens: torch.Tensor
    """int32 [T], the place row * S + column of each token."""
    rows: torch.Tensor
    """int32 [B, S], the token of each place; -1 where none is computed."""
    padding: bool
    """Whether all that is hidden is computed, too; else only a row's first place is."""

    @property
    def sources(self) -> int:
        return self.hidden.shape[1]

    def piece(self, start: int, stop: int, tokens: int) -> "Call":
        """The same of some rows, of so many tokens."""
        part = slice(start, stop)
        return replace(
            self,
            ids={name: None if t is None else t[part] for name, t in self.ids.items()},
            mask=None if self.mask is None else self.mask[part],
            hidden=self.hidden[part],
            lengths=self.lengths[part],
            visible=self.visible[part],
            tokens=self.tokens[:tokens],
            rows=self.rows[part],
        )


@dataclass(frozen=True, eq=False)
class Size:
    """What the launches between reading and spreading are run over."""

    tokens: int
    """Rows of all buffers; what lies behind the last token is computed for nothing."""
    longest: int
    """Tokens of a row, at most."""
    starts: torch.Tensor
    """int32 [B + 1], where each row's tokens begin."""
    keys: torch.Tensor
    """int32 [B], how many of a row's first tokens its queries see."""
    even: bool = False
    """Whether all rows have as many tokens as the longest, and see them all."""
    side: Sequence[cuda.Side] = ()
    """Streams for what does not depend on each other, beside the current one."""
    fetching: cuda.Side | None = None
    """A stream that fetches weights ahead of their products."""
    columns: torch.Tensor | None = None
    """int32 [capacity], the column of each token in its row; None: no launch asks."""


@dataclass(frozen=True, eq=False)
class Term:
    """``scale * table[ids + offset]``."""

    ids: str | None
    """Which of a call's; None: the token's column in its row."""
    table: torch.Tensor
    scale: float = 1.0
    offset: int = 0


@dataclass(eq=False)
class Norm:
    """What a layer norm needs beside its input; without a bias, a root-mean-square norm."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    vector: int = field(init=False)

    def __post_init__(self) -> None:
        self.vector = vector(*(t for t in (self.weight, self.bias) if t is not None))

    @property
    def kind(self) -> str:
        return "RMS" if self.bias is None else "LAYER"

    def threads(self, vector: int) -> int:
        """Of a block that holds a row: one a load, or several loads for each of the most."""
        most = THREADS if vector > 1 else 1024
        return min(most, -(-len(self.weight) // (32 * vector)) * 32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x, weight, axes = x.float(), self.weight.float(), x.shape[-1:]
        if self.bias is None:
            return rms_norm(x, axes, weight, self.eps)
        return layer_norm(x, axes, weight, self.bias.float(), self.eps)


def vector(*tensors: torch.Tensor) -> int:
    """Elements of one load from rows of each of these."""
    fits = all(t.shape[-1] % VECTOR == 0 and t.data_ptr() % 16 == 0 for t in tensors)
    return VECTOR if fits else 1
