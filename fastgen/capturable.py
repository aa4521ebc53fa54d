"""What torch code a CUDA graph can hold, found out before it is captured."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.errors import FastgenError


class NotCapturable(FastgenError):
    """A function asks the GPU for a value or draws random numbers, which a graph cannot hold."""


class RefuseDraws(TorchDispatchMode):
    """Finds out, in this thread only, whether torch code draws random numbers."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        draws = torch.Tag.nondeterministic_seeded in function.tags
        if name in _DROPOUT:
            given = dict(enumerate(args)) | (kwargs or {})
            draws = bool(given.get(_DROPOUT[name], given.get("dropout_p")))
        if draws:
            raise NotCapturable(f"torch.{name} draws from the generator that all threads share")
        return function(*args, **(kwargs or {}))


class RefuseWaits(RefuseDraws):
    """Finds out as well whether it would wait for a value of the GPU, which breaks a capture."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in _WAITING:
            raise NotCapturable(f"torch.{name} gives the host a value of the GPU")
        return super().__torch_dispatch__(function, types, args, kwargs)


# Which argument of attention is its dropout, without which it draws nothing
_DROPOUT = {
    **{"_flash_attention_forward": 7, "_efficient_attention_forward": 8},
    **{"_scaled_dot_product_flash_attention": 3, "_scaled_dot_product_cudnn_attention": 5},
    "_scaled_dot_product_efficient_attention": 5,
}

# What .item(), bool(), boolean indexing and unique() come down to
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")
