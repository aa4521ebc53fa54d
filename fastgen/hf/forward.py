"""``forward`` with the parameters of the stock class, whichever names its version gives them."""

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch

from fastgen.hf import contract

_F = TypeVar("_F", bound=Callable[..., Any])


def with_signature(function: _F) -> _F:
    """Keep the signature, which ``generate`` asks for several times a call at 50 us each."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


def forward_like(stock: Any) -> Any:
    """A method ``forward`` that takes what ``stock`` takes and hands it on by name to
    ``self._forward(**arguments)``; DLPack tensors (of CuPy, say) become torch tensors.

    ``generate`` reads the parameters, several times a call: the signature is kept.
    """
    signature = inspect.signature(stock)
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
