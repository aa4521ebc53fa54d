"""Linear layers as libraries hold them, without the libraries: classes of the same names and
fields, by which torch multiplies as by theirs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.quantised import rounded

Held = Callable[[torch.nn.Linear], torch.nn.Module]
"""Makes of a Linear what a library would; may change it in place."""


class Wrapped(torch.Tensor):
    """A tensor around others, as torchao's are: shape and dtype of what they stand for."""

    fields: dict[str, Any]

    @staticmethod
    def __new__(cls, dtype: torch.dtype, **fields: Any) -> "Wrapped":
        values = fields["qdata"]
        made: Wrapped = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=dtype, device=values.device
        )
        made.fields = fields
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    def dequantize(self) -> torch.Tensor:
        zero, times = self.fields["zero_point"], self.fields["block_size"][1]
        zero = torch.zeros_like(self.fields["scale"]) if zero is None else zero.float()
        scale = self.fields["scale"]
        whole = self.fields["qdata"].float() - zero.repeat_interleave(times, 1)
        return (whole * scale.repeat_interleave(times, 1)).to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return func(args[0], args[1].dequantize(), *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return type(args[0])(args[0].dtype, **args[0].fields)
        raise NotImplementedError(f"{func} of {cls.__name__}")

    def __deepcopy__(self, memo: Any) -> torch.nn.Parameter:
        fields = tree_map(lambda field: copy.deepcopy(field, memo), self.fields)
        return torch.nn.Parameter(type(self)(self.dtype, **fields), requires_grad=False)


def torchao_class(name: str) -> type[Wrapped]:
    """The fake of a class of torchao's."""
    return type(name, (Wrapped,), {"__module__": "torchao.quantization"})


INT8, INTX, FLOAT8 = map(torchao_class, ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"))


def steps(
    weight: torch.Tensor, bits: int, group: int | None, zeros: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers around 0, scales and zero points of a weight [N, K], by groups of K."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grouped = weight.detach().float().unflatten(1, (-1, group or weight.shape[1]))
    most, least = grouped.amax(2).clamp(min=0), grouped.amin(2).clamp(max=0)
    if zeros:
        scales = (most - least) / (high - low)
        points = (low - least / scales).round().clamp(low, high)
    else:
        scales = torch.maximum(most, -least) / high
        points = torch.zeros_like(scales)
    whole = (grouped / scales[..., None] + points[..., None]).round().clamp(low, high)
    return whole.flatten(1).to(torch.int8), scales, points.to(torch.int8)


def torchao(bits: int = 8, group: int | None = None, zeros: bool = False, **more: Any) -> Held:
    """Int8WeightOnlyConfig, or IntxWeightOnlyConfig of fewer bits, groups or zero points."""

    def hold(linear: torch.nn.Linear) -> torch.nn.Module:
        values, scales, points = steps(linear.weight, bits, group, zeros)
        plain = bits == 8 and group is None and not zeros
        own = {} if plain else {"target_dtype": getattr(torch, f"int{bits}")}
        made = (INT8 if plain else INTX)(
            linear.weight.dtype,
            qdata=values,
            scale=scales,
            zero_point=points,
            block_size=(1, group or linear.in_features),
            **own | more,
        )
        linear.weight = torch.nn.Parameter(made, requires_grad=False)
        return linear

    return hold


def float8(linear: torch.nn.Linear) -> torch.nn.Module:
    """Float8WeightOnlyConfig."""
    weight = linear.weight.detach()
    scales = weight.float().abs().amax(1, keepdim=True) / 448
    values = (weight.float() / scales).to(torch.float8_e4m3fn)
    fields = {"zero_point": None, "block_size": [1, linear.in_features]}
    made = FLOAT8(weight.dtype, qdata=values, scale=scales, **fields)
    linear.weight = torch.nn.Parameter(made, requires_grad=False)
    return linear


class Int8Params(torch.nn.Parameter):
    """bitsandbytes' parameter, which the scales lie beside."""

    SCB: torch.Tensor | None = None


class Linear8bitLt(torch.nn.Linear):
    """bitsandbytes' layer of 8 bits: once it has run, its scales are elsewhere."""

    class State:
        SCB: torch.Tensor | None = None

    state: State

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        if weight.SCB is not None:
            self.state.SCB, weight.SCB = weight.SCB, None
        whole = weight.float() * self.state.SCB[:, None] / 127  # type: ignore[index]
        return torch.nn.functional.linear(rounded(x.half().float(), x.shape[-1]), whole, self.bias)


class Linear4bit(torch.nn.Linear):
    """bitsandbytes' layer of a table's 4 bits, in as far as it has another class."""


for _kind in (Linear8bitLt, Linear4bit):
    _kind.__module__ = "bitsandbytes.nn.modules"


def bitsandbytes(linear: torch.nn.Linear) -> torch.nn.Module:
    """load_in_8bit=True."""
    values, scales, _ = steps(linear.weight, 8, None, zeros=False)
    linear.__class__, linear.state = Linear8bitLt, Linear8bitLt.State()  # type: ignore[assignment]
    weight = Int8Params(values, requires_grad=False)
    linear.weight, weight.SCB = weight, 127 * scales[:, 0]
    return linear


def bitsandbytes_4bit(linear: torch.nn.Linear) -> torch.nn.Module:
    """load_in_4bit=True."""
    linear.__class__ = Linear4bit
    return linear


def quanto(name: str = "qint8", **more: Any) -> Held:
    """QuantoConfig(weights="int8")."""

    def hold(linear: torch.nn.Linear) -> torch.nn.Module:
        values, scales, _ = steps(linear.weight, 8, None, zeros=False)
        kind: Any = type("WeightQBytesTensor", (Wrapped,), {"__module__": "optimum.quanto.tensor"})
        fields = {"_data": values, "_scale": scales, "axis": 0, "activation_qtype": None}
        fields["qtype"] = type("qtype", (), {"name": name})
        own = {"qdata": values, "scale": scales, "zero_point": None}
        own["block_size"] = (1, linear.in_features)
        made = kind(linear.weight.dtype, **own | fields | more)
        linear.weight = torch.nn.Parameter(made, requires_grad=False)
        return linear

    return hold


def of_library(module: str, name: str) -> Held:
    """A layer of another library's, in as far as it has another class."""

    def hold(linear: torch.nn.Linear) -> torch.nn.Module:
        linear.__class__ = type(name, (torch.nn.Linear,), {"__module__": module})
        return linear

    return hold


def hold(model: torch.nn.Module, held: Held, but: tuple[str, ...] = ("lm_head",)) -> None:
    """Let a library hold all Linear layers of a model, but for some."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, layer in layers:
        if not name.endswith(but):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, held(layer))
