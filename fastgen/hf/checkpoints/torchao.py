"""torchao: a Linear stays one, and its weight is a tensor subclass around plain tensors."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from fastgen.hf.checkpoints.held import Held, Integers, group_refusal

_SERVED = (
    "Int8WeightOnlyConfig and IntxWeightOnlyConfig (int1 to int8) are served; "
    "load the model with one of them"
)


def read(module: torch.nn.Module) -> Held | str | None:
    """The weight of a module, or why only torch multiplies by it; None if it is no such weight."""
    weight = module._parameters.get("weight")
    if weight is None or not type(weight).__module__.startswith("torchao."):
        return None
    held: Any = weight
    kind = type(held).__name__
    if not isinstance(module, torch.nn.Linear):
        return f"torchao's {kind} in a {type(module).__name__}: only those of a Linear are served"
    if kind == "Float8Tensor" and _on_gpu(held):
        return _float8(module, held)
    if kind not in _BITS:
        return f"weights are torchao's {kind}: {_SERVED}"
    if not isinstance(bits := _BITS[kind](held), int):
        return f"weights are torchao's {kind}, {bits}: {_SERVED}"
    rows, group = held.block_size
    refusal = group_refusal(group, module.in_features)
    if rows != 1 or refusal:
        return f"weights are torchao's {kind}, {refusal or f'scales of {rows} rows'}: {_SERVED}"
    if getattr(held, "act_pre_scale", None) is not None:
        return f"weights are torchao's {kind} with scales of inputs: {_SERVED}"
    zeros = held.zero_point
    return Held(
        library="torchao",
        kind="int4" if bits <= 4 else "int8",
        group=group,
        zeros=zeros is not None and bool(zeros.any()),
        shape=(module.out_features, module.in_features),
        part=weakref.ref(module),
        leaf="weight",
        unpack=_unpack,
        inside=_inside,
        rounds="inputs to 8 bits" if _rounds_inputs(held) else None,
    )


def _on_gpu(held: Any) -> bool:
    """Elsewhere no engine has products by 8-bit floats."""
    return bool(held.qdata.is_cuda)


def _float8(module: torch.nn.Linear, held: Any) -> Held | str:
    scales = tuple(held.block_size)
    if held.qdata.dtype != torch.float8_e4m3fn or scales != (1, module.in_features):
        kind = f"of {held.qdata.dtype} with scales of blocks of {scales}"
        return f"weights are torchao's Float8Tensor {kind}: float8_e4m3fn of whole rows is served"
    return Held(
        library="torchao",
        kind="fp8",
        group=module.in_features,
        zeros=False,
        shape=(module.out_features, module.in_features),
        part=weakref.ref(module),
        leaf="weight",
        unpack=_unpack_float8,
        inside=_inside_float8,
        rounds="inputs to 8 bits" if _rounds_inputs(held) else None,
    )


def _unpack_float8(module: torch.nn.Module) -> Integers:
    values, scales = _inside_float8(module)
    return Integers(values, scales, None)


def _inside_float8(module: torch.nn.Module) -> list[torch.Tensor]:
    held: Any = module.weight
    return [held.qdata, held.scale]


def _int8_bits(held: Any) -> int | str:
    return 8


def _intx_bits(held: Any) -> int | str:
    name = str(held.target_dtype).removeprefix("torch.int")
    return int(name) if name.isdigit() and int(name) <= 8 else f"of {held.target_dtype}"


#: The classes that are served, and how many bits their values have.
_BITS = {"Int8Tensor": _int8_bits, "IntxUnpackedToInt8Tensor": _intx_bits}


def _rounds_inputs(held: Any) -> bool:
    fields = "act_quant_kwargs", "act_quant_scale", "activation_quantization"
    return any(getattr(held, field, None) is not None for field in fields)


def _unpack(module: torch.nn.Module) -> Integers:
    held: Any = module.weight
    (outputs, _), zeros = held.shape, held.zero_point
    if zeros is not None:
        zeros = zeros.reshape(outputs, -1) if bool(zeros.any()) else None
    return Integers(held.qdata, held.scale.reshape(outputs, -1), zeros)


def _inside(module: torch.nn.Module) -> Sequence[torch.Tensor]:
    held: Any = module.weight
    parts = held.qdata, held.scale, held.zero_point
    return [part for part in parts if part is not None]
