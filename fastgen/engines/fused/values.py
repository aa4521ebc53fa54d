"""What FusedOps works with: operations that are only described yet, and the kernels' parameters."""

import ctypes
from dataclasses import dataclass, field

import torch

from fastgen.blockwise import Blocks
from fastgen.engines.nvrtc import ELEMENTS

# What an operation gives before its numbers are needed


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions of the query tokens in their rows [B, Q], at least 0."""

    places: torch.Tensor
    """[Q, 1], in the order of slots."""
    row_start: torch.Tensor | None
    """[B, 1]; None: rows begin at the first slot."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """Rows of a table by token id, times ``scale``; plus those of a table by position."""

    ids: torch.Tensor
    weight: torch.Tensor
    scale: float
    places: "Placed | None" = None


@dataclass(frozen=True, eq=False)
class Placed:
    """Rows of a table by position, ``offset`` further on."""

    positions: Positions
    weight: torch.Tensor
    offset: int


@dataclass(frozen=True, eq=False)
class Residual:
    """A residual stream, float32 [B * Q, E], as it is after ``additions`` (made in place)."""

    tensor: torch.Tensor
    additions: int


@dataclass(frozen=True, eq=False)
class Normed:
    """A norm of the residual stream; with a ``bias`` that of its deviations from the mean."""

    residual: Residual
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    launched: "list[LinearArgs]" = field(default_factory=list)
    """Launches that compute it: the first can store it, where it is the next residual stream."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """What a product multiplies by: [out, in], or where ``across`` [in, out]; or its blocks."""

    values: torch.Tensor
    sizes: tuple[int, int]
    """How many inputs and outputs."""
    across: bool = False
    blocks: Blocks | None = None
    """Whose ``values`` they are, with the scales; always [out, in]."""

    @property
    def scales(self) -> torch.Tensor | None:
        return None if self.blocks is None else self.blocks.scales

    @property
    def zeros(self) -> torch.Tensor | None:
        return None if self.blocks is None else self.blocks.zeros

    @property
    def group(self) -> int:
        """Inputs that share a scale in one output; 0: all, or there are no scales."""
        if self.blocks is None or self.values.ndim == 2:
            return 0
        return self.values.shape[2] * (2 if self.blocks.kind == "int4" else 1)

    @property
    def plain(self) -> bool:
        """Whether it is of numbers of 16 bits."""
        return self.blocks is None and self.values.dtype.itemsize == 2

    @property
    def element(self) -> str:
        """What the kernels' sources call its type."""
        if self.blocks is None:
            return ELEMENTS[self.values.dtype]
        if self.blocks.kind == "fp8":
            return "Fp8"
        bits = self.blocks.kind.removeprefix("int")
        sizes = f"{bits}, {self.group}, {ELEMENTS[self.blocks.scales.dtype]}"
        flags = self.values.dtype == torch.int8, self.zeros is not None  # SIGNED, ZEROS
        return f"Ints<{', '.join([sizes, *(str(f).lower() for f in flags if any(flags))])}>"


@dataclass(frozen=True, eq=False)
class Product:
    """``scale * x @ weight.T + bias``."""

    x: "Normed | torch.Tensor"
    weight: Matrix
    scale: float
    bias: torch.Tensor | None = None
    name: str = ""
    """Of the operation (see ``ops/names.py``)."""

    @property
    def sizes(self) -> tuple[int, int]:
        """How many inputs and outputs."""
        return self.weight.sizes


@dataclass(frozen=True, eq=False)
class Part:
    """One of ``count`` equal parts of a product's outputs."""

    product: Product
    index: int
    count: int


@dataclass(frozen=True, eq=False)
class HeadNormed:
    """A root-mean-square norm of each head of a product."""

    product: Product
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Angles:
    """By how much the heads of query tokens are turned."""

    positions: Positions
    table: torch.Tensor
    """Cosines and sines by position, float32 [positions, D / 2, 2]."""


@dataclass(frozen=True, eq=False)
class Turned:
    """Heads that are turned by their tokens' positions."""

    x: Product | HeadNormed
    angles: Angles


@dataclass(frozen=True, eq=False)
class Activated:
    """``activation(product)``, times another product if there is a gate."""

    product: Product
    activation: str
    gate: Product | None = None


# The kernels' parameters (see common.cu, weights.cu, linear.cu, rotary.cu and attention.cu)

_POINTER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_float, ctypes.c_int
_LONG = ctypes.c_longlong


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class EmbeddingArgs(ctypes.Structure):
    _fields_ = [
        *(("ids", _POINTER), ("weight", _POINTER), ("places", _POINTER), ("positions", _POINTER)),
        *(("row_start", _POINTER), ("residual", _POINTER), ("scale", _FLOAT)),
        *(("width", _INT), ("offset", _INT), ("known", _INT), ("queries", _INT)),
    ]


class NormArgs(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("bias", _POINTER), ("stream", _POINTER), ("eps", _FLOAT)]


class LinearArgs(ctypes.Structure):
    _fields_ = [
        *(("x", _POINTER), ("weight", _POINTER * 3), ("scales", _POINTER * 3)),
        *(("zeros", _POINTER * 3), ("bias", _POINTER * 3), ("y", _POINTER)),
        *(("scale", _FLOAT), ("norm", NormArgs)),
    ]


class DequantiseArgs(ctypes.Structure):
    _fields_ = [
        *(("weight", _POINTER), ("scales", _POINTER), ("zeros", _POINTER)),
        *(("y", _POINTER), ("rows", _INT)),
    ]


class TurnArgs(ctypes.Structure):
    _fields_ = [
        *(("angles", _POINTER), ("query_norm", _POINTER), ("key_norm", _POINTER)),
        *(("eps", _FLOAT), ("known", _INT)),
    ]


class TurnRowsArgs(ctypes.Structure):
    _fields_ = [
        *(("x", _POINTER), ("query_positions", _POINTER), ("row_start", _POINTER)),
        *(("heads", _INT), ("keys", _INT), ("stride", _INT), ("queries", _INT)),
        ("turn", TurnArgs),
    ]


class AttentionArgs(ctypes.Structure):
    _fields_ = [
        *(("q", _POINTER), ("key", _POINTER), ("value", _POINTER)),
        *(("table", _POINTER), ("mask", _POINTER), ("query_positions", _POINTER)),
        *(("slot_positions", _POINTER), ("first_slot", _POINTER), ("row_start", _POINTER)),
        *(("y", _POINTER), ("heads", _INT), ("slots", _INT), ("stride", _INT)),
        *(("span", _INT), ("reach", _INT), ("queries", _INT), ("scale", _FLOAT)),
        ("turn", TurnArgs),
    ]


class ActivateArgs(ctypes.Structure):
    _fields_ = [("x", _POINTER), ("gate", _POINTER), ("y", _POINTER), ("count", _LONG)]
