"""In which dtype results leave an engine: the model's own, as stock's do.

On a CPU engines compute models of 16 bits in float32. What goes on to another engine, or to the
loops of ``generate``, is not rounded on its way.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Within(threading.local):
    """Modules whose caller, in this thread, goes on computing with what their engines give."""

    modules: frozenset[int] = frozenset()


_within = _Within()


@contextmanager
def within(*modules: Any) -> Iterator[None]:
    """Until the end of the body, these give what their engines computed as it is."""
    outer = _within.modules
    _within.modules = outer.union(map(id, modules))
    try:
        yield
    finally:
        _within.modules = outer


@contextmanager
def outside() -> Iterator[None]:
    """Until the end of the body, torch computes with what modules give."""
    outer, _within.modules = _within.modules, frozenset()
    try:
        yield
    finally:
        _within.modules = outer


def given(module: Any, tensor: torch.Tensor) -> torch.Tensor:
    """What a module's caller gets of an engine's result."""
    return tensor if id(module) in _within.modules else rounded(module, tensor)


def rounded(module: Any, tensor: torch.Tensor) -> torch.Tensor:
    """An engine's result in the model's dtype, which on a GPU it has."""
    if tensor.device.type != "cpu":
        return tensor
    glance = getattr(module, "_glance", None)  # of this call; a module searches for its dtype
    return tensor.to(module.dtype if glance is None else glance.dtype)


def reads(module: Any, hidden: torch.Tensor) -> bool:
    """Whether a module's caller may give it hidden states in their dtype."""
    return hidden.dtype == module.dtype or _not_rounded(module, hidden)


def as_torch_reads(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What the stock module gets of hidden states that were meant for the engine."""
    return hidden.to(module.dtype) if _not_rounded(module, hidden) else hidden


def _not_rounded(module: Any, hidden: torch.Tensor) -> bool:
    """Whether they may be another engine's, as that gave them."""
    wide = hidden.dtype == torch.float32 and hidden.device.type == "cpu"
    return wide and id(module) in _within.modules
