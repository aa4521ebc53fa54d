"""Refusals that stand while their cause does: a call on torch does not look at all weights again.

A look at a whole model takes some 0.3 ms, which a model that torch serves would pay at every call.
"""

import weakref
from collections.abc import Callable

import torch

from fastgen.engines import NoEngine


class Standing(NoEngine):
    """No engine serves a model for as long as ``still(part)`` is true.

    ``still`` takes a microsecond, and keeps no reference to the model.
    """

    def __init__(
        self, message: str, part: torch.nn.Module, still: Callable[[torch.nn.Module], bool]
    ) -> None:
        super().__init__(message)
        self.part, self.still = part, still


class Remembered:
    """A Standing refusal of the model ``root``; neither the model nor the part is kept alive."""

    def __init__(self, root: torch.nn.Module, refusal: Standing) -> None:
        self.reason = str(refusal)
        self._part, self._still = weakref.ref(refusal.part), refusal.still
        names = (name for name, module in root.named_modules() if module is refusal.part)
        self._path = [name for name in next(names, "?").split(".") if name]

    def holds(self, root: torch.nn.Module) -> bool:
        """Whether the part is still where it was, and still the cause."""
        module: torch.nn.Module | None = root
        for name in self._path:
            module = None if module is None else module._modules.get(name)
        return module is not None and module is self._part() and self._still(module)
