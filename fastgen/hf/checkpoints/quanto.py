"""optimum-quanto: its QLinear is a Linear, whose weight is a subclass around plain tensors."""

import weakref
from typing import Any

import torch

from fastgen.hf.checkpoints.held import Held, Integers


def read(module: torch.nn.Module) -> Held | str | None:
    """The weight of a module, or why only torch multiplies by it; None if it is no such weight."""
    weight = module._parameters.get("weight")
    if weight is None or not type(weight).__module__.startswith("optimum.quanto."):
        return None
    held: Any = weight
    number = str(held.qtype.name)
    if not isinstance(module, torch.nn.Linear) or number != "qint8" or held.axis != 0:
        return (
            f"weights are quanto's {number} ({type(held).__name__} of a {type(module).__name__}): "
            "those of Linear layers in int8 are served, by QuantoConfig(weights='int8')"
        )
    return Held(
        library="quanto",
        kind="int8",
        group=module.in_features,
        zeros=False,
        shape=(module.out_features, module.in_features),
        part=weakref.ref(module),
        leaf="weight",
        unpack=_unpack,
        inside=_inside,
        rounds="inputs to 8 bits" if held.activation_qtype is not None else None,
    )


def _unpack(module: torch.nn.Module) -> Integers:
    values, scales = _inside(module)
    return Integers(values, scales.reshape(len(values), 1), None)


def _inside(module: torch.nn.Module) -> list[torch.Tensor]:
    held: Any = module.weight
    return [held._data, held._scale]
