"""What FusedOps works with: operations that are only described yet, and the kernels' parameters."""

import ctypes
from dataclasses import dataclass, field

import torch

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
class Product:
    """``scale * x @ weight.T + bias``; ``across``: the weight is [in, out]."""

    x: "Normed | torch.Tensor"
    weight: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    across: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """How many inputs and outputs."""
        first, second = self.weight.shape
        return (first, second) if self.across else (second, first)


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


# The kernels' parameters (see common.cu, linear.cu, rotary.cu and attention.cu)

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
        *(("x", _POINTER), ("weight", _POINTER * 3), ("bias", _POINTER * 3), ("y", _POINTER)),
        *(("scale", _FLOAT), ("norm", NormArgs)),
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
