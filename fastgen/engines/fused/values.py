"""What FusedOps works with: operations that are only described yet, and the kernels' parameters."""

import ctypes
from dataclasses import dataclass

import torch

# What an operation gives before its numbers are needed


@dataclass(frozen=True, eq=False)
class Residual:
    """The residual stream, float32 [B * Q, E], as it is after ``additions`` (made in place)."""

    tensor: torch.Tensor
    additions: int


@dataclass(frozen=True, eq=False)
class Normed:
    residual: Residual
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Product:
    """``scale * x @ weight.T``."""

    x: "Normed | torch.Tensor"
    weight: torch.Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Activated:
    """``activation(product)``, times another product if there is a gate."""

    product: Product
    activation: str
    gate: Product | None = None


# The kernels' parameters (see linear.cu and attention.cu)

_POINTER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_float, ctypes.c_int
_LONG = ctypes.c_longlong


class EmbeddingArgs(ctypes.Structure):
    _fields_ = [("ids", _POINTER), ("weight", _POINTER), ("residual", _POINTER), ("width", _INT)]


class LinearArgs(ctypes.Structure):
    _fields_ = [
        *(("x", _POINTER), ("norm", _POINTER), ("weight", _POINTER * 3), ("y", _POINTER)),
        *(("eps", _FLOAT), ("scale", _FLOAT)),
    ]


class AttentionArgs(ctypes.Structure):
    _fields_ = [
        *(("q", _POINTER), ("key", _POINTER), ("value", _POINTER)),
        *(("table", _POINTER), ("mask", _POINTER), ("query_positions", _POINTER)),
        *(("slot_positions", _POINTER), ("first_slot", _POINTER), ("y", _POINTER)),
        *(("heads", _INT), ("slots", _INT), ("stride", _INT)),
        *(("span", _INT), ("low", _INT), ("high", _INT)),
    ]


class ActivateArgs(ctypes.Structure):
    _fields_ = [("x", _POINTER), ("gate", _POINTER), ("y", _POINTER), ("count", _LONG)]
