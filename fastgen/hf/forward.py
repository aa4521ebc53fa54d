"""``forward`` with the parameters of the stock class: on the engine, or by torch."""

import inspect
from itertools import chain
from typing import Any

import numpy as np
import torch

from fastgen.fallback import report, said
from fastgen.hf import contract
from fastgen.hf.outward import outside
from fastgen.hf.stock import stands_in, stock_class


class StockForward:
    """Mixin of a class that stands in for a stock one, before it among the bases: its ``forward``
    runs on the engine what nothing refuses, and leaves the rest to the stock one."""

    forward: Any
    refusal: Any
    _run: Any
    """``forward`` on the engine."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if stands_in(cls):
            cls.forward = forward_like(stock_class(cls).forward)

    def _forward(self, **arguments: Any) -> Any:
        if (reason := self.refusal(**arguments)) is None:
            return self._run(**arguments)
        report(self, "torch", reason)
        return self._by_torch(**arguments)

    def _by_torch(self, **arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(**arguments)  # type: ignore[misc]
        with said(), outside():
            return super().forward(**arguments)  # type: ignore[misc]


class _Kept(inspect.Signature):
    """A method's signature, whose like without ``self`` is made once: ``inspect.signature`` of a
    bound method makes it with ``replace``."""

    def __init__(self, parameters: Any = None, **more: Any) -> None:
        super().__init__(parameters, **more)
        self._behind_self = tuple(self.parameters.values())[1:]
        self._bound = self._plain().replace(parameters=self._behind_self)

    def replace(self, **changes: Any) -> Any:
        """As of every signature."""
        if changes.keys() == {"parameters"} and changes["parameters"] == self._behind_self:
            return self._bound
        return self._plain().replace(**changes)

    def _plain(self) -> inspect.Signature:
        parameters = tuple(self.parameters.values())
        return inspect.Signature(parameters, return_annotation=self.return_annotation)


def forward_like(stock: Any) -> Any:
    """A method ``forward`` that takes what ``stock`` takes and hands it on by name to
    ``self._forward(**arguments)``; DLPack tensors (of CuPy, say) become torch tensors.

    ``generate`` reads the parameters, several times a call: the signature is kept.
    """
    signature = _Kept.from_callable(stock)
    names = tuple(signature.parameters)[1:]

    @contract.renames_cache
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock module: arguments, shapes and outputs are those of its ``forward``."""
        given = chain(zip(names, args, strict=False), kwargs.items())
        return self._forward(**{name: as_torch(value) for name, value in given})

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def as_torch(value: Any) -> Any:
    """A foreign DLPack tensor as a torch tensor on the same memory; anything else as it is, and so
    are NumPy arrays: the stock classes refuse them."""
    if isinstance(value, (torch.Tensor, np.ndarray)) or not hasattr(value, "__dlpack__"):
        return value
    return torch.from_dlpack(value)
