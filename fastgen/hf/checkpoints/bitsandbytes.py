"""bitsandbytes: Linear layers of its own, of int8 with a scale a row, or of floats in a table."""

import weakref
from typing import Any

import torch

from fastgen.hf.checkpoints.held import Held, Integers


def read(module: torch.nn.Module) -> Held | str | None:
    """The weight of a module, or why only torch multiplies by it; None if it is no such module."""
    kind = type(module)
    if not kind.__module__.startswith("bitsandbytes."):
        return None
    weight = module._parameters.get("weight")
    if not kind.__name__.startswith("Linear8bit") or weight is None or weight.dtype != torch.int8:
        return (
            f"weights are bitsandbytes' {kind.__name__}, whose values are no multiples of a scale: "
            "load the model with load_in_8bit=True and EngineOptions(weights='int8'), or "
            "unquantised with EngineOptions(weights='int4')"
        )
    outputs, inputs = weight.shape
    return Held(
        library="bitsandbytes",
        kind="int8",
        group=inputs,
        zeros=False,
        shape=(outputs, inputs),
        part=weakref.ref(module),
        leaf="weight",
        unpack=_unpack,
        inside=_inside,
        rounds="inputs to float16 and 8 bits",
    )


def _unpack(module: torch.nn.Module) -> Integers:
    values, largest = _inside(module)
    return Integers(values, largest.float()[:, None] / 127, None)


def _inside(module: torch.nn.Module) -> list[torch.Tensor]:
    """int8 [N, K], and the largest number of each row, which 127 stands for."""
    held: Any = module
    state = held.weight.SCB  # until the module's first forward moves it
    return [held.weight.detach(), held.state.SCB if state is None else state]
