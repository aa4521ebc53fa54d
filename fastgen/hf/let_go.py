"""Weights that torch no longer holds: what is left of a parameter once engines read what was made
of it, and nobody else is to read it."""

from typing import Any, NoReturn

import torch

from fastgen.errors import WeightsGoneError


class Gone(torch.Tensor):
    """A parameter without its numbers: shape, dtype, device, and the place where they were.

    Whatever would read or write them raises ``WeightsGoneError``.
    """

    _named: str
    _place: int
    _edits: int
    _uncounted: bool

    @staticmethod
    def __new__(cls, parameter: torch.Tensor, name: str) -> "Gone":
        gone: Gone = torch.Tensor._make_wrapper_subclass(
            cls,
            parameter.shape,
            strides=parameter.stride(),
            dtype=parameter.dtype,
            device=parameter.device,
            requires_grad=parameter.requires_grad,
        )
        gone._named, gone._place = name, parameter.data_ptr()
        gone._uncounted = parameter.is_inference()
        gone._edits = 0 if gone._uncounted else parameter._version
        gone._is_param = isinstance(parameter, torch.nn.Parameter)
        return gone

    # what only describes a tensor is answered without a look at its subclass
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        parts = [*args, *(kwargs or {}).values()]
        parts += [item for part in parts if isinstance(part, (list, tuple)) for item in part]
        next(part for part in parts if isinstance(part, cls)).refuse()

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Raise the error of whoever needs its numbers."""
        raise WeightsGoneError(
            f"{self._named} was let go, as EngineOptions(keep_torch_weights=False) asked: engines "
            "hold it in another form, and what torch computes, saves or moves needs it whole. "
            "Load the model once more (from_pretrained), or with keep_torch_weights=True."
        )

    __deepcopy__ = __reduce_ex__ = numpy = untyped_storage = refuse

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Gone({self._named}, {tuple(self.shape)}, {self.dtype})"

    # Of a module's weights these tell that nothing has changed (see ``weights.Glance``)

    def data_ptr(self) -> int:
        """Where its numbers were."""
        return self._place

    @property
    def _version(self) -> int:  # type: ignore[override]
        return self._edits

    def is_inference(self) -> bool:
        """Whether it was made in inference mode, in which torch counts no edits."""
        return self._uncounted


def let_go(parameter: torch.Tensor, name: str) -> None:
    """Make a parameter a ``Gone`` in place, for all who have it. One that torch may still compute
    gradients of stays."""
    gone = Gone(parameter, name)
    try:
        torch.utils.swap_tensors(parameter, gone)
    except RuntimeError:  # more than its Python object refers to it
        return
