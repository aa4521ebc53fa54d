"""Quantisation-aware training: linear layers that compute as their 8-bit integers will.

What a layer reads and its weight are rounded to the integers' steps, in the model's own dtype;
gradients pass the rounding as if it were not there, and stop where a range cuts numbers off.
"""

from typing import Any, TypeVar

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fastgen.calibration import Calibration, Range
from fastgen.hf.module import EngineModule
from fastgen.int8 import row_steps
from fastgen.quantize.calibrate import encoder_of, linear_layers

_Model = TypeVar("_Model", bound=torch.nn.Module)


class _Rounded:
    """Mixin of a linear layer that knows the range of what it reads."""

    weight: Any
    bias: Any
    read: Range
    _outputs_axis = 0
    """Of the weight."""

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as uint8 of the range stands for it."""
        step, zero = self.read.asymmetric()
        rounded = torch.fake_quantize_per_tensor_affine(x.float(), step, zero, 0, 255)
        return rounded.to(x.dtype)

    def rounded_weight(self) -> torch.Tensor:
        """The weight as int8 stands for it, with a step for each output."""
        weight, axis = self.weight, self._outputs_axis
        steps = row_steps(weight.detach().movedim(axis, 0)).float()
        zeros = torch.zeros_like(steps, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(
            weight.float(), steps, zeros, axis, -127, 127
        )
        return rounded.to(weight.dtype)


class RoundedLinear(_Rounded, torch.nn.Linear):
    """torch.nn.Linear, computed as of integers."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.rounded_input(input), self.rounded_weight(), self.bias)


class RoundedConv1D(_Rounded, Conv1D):
    """transformers' Conv1D, whose weight is [in, out], computed as of integers."""

    _outputs_axis = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.rounded_input(x), self.rounded_weight().t(), self.bias)


_ROUNDED: dict[type, type] = {torch.nn.Linear: RoundedLinear, Conv1D: RoundedConv1D}


def prepare_qat(model: _Model, calibration: Calibration | None = None) -> _Model:
    """Let the calibrated layers of a model's encoder compute as of 8-bit integers in training, too.

    The model is changed in place: parameters, their names, and what ``save_pretrained`` writes stay
    the same, so it trains in ``transformers.Trainer`` or a loop of one's own like any other. Calls
    without gradients in evaluation mode run on the engine, in integers. ``convert`` ends it.

    Args:
        model: a Fast model (see ``calibrate``).
        calibration: whose layers and ranges; None takes ``model.calibration``.

    Returns:
        The model.

    Raises:
        ValueError: the model is not calibrated, or the calibration is of another model.
        TypeError: a layer is no plain linear layer, or the model has no Fast encoder.
    """
    stack = encoder_of(model)
    known = stack.calibration if calibration is None else calibration
    if known is None:
        raise ValueError("the model is not calibrated: fastgen.quantize.calibrate it first.")
    layers = linear_layers(stack)
    if missing := sorted(known.inputs.keys() - layers.keys()):
        raise ValueError(f"the calibration is of another model: there is no layer {missing[0]}.")
    for name, read in known.inputs.items():
        layer, kind = layers[name], type(layers[name])
        if kind not in _ROUNDED and kind not in _ROUNDED.values():
            raise TypeError(f"{name} is a {kind.__qualname__}, no plain linear layer.")
        layer.__class__ = _ROUNDED.get(kind, kind)
        vars(layer)["read"] = read
    assert isinstance(model, EngineModule)
    model.calibration = known
    return model


def convert(model: _Model) -> _Model:
    """End what ``prepare_qat`` began: plain layers again, whose engine computes in integers.

    Returns:
        The model, changed in place; ``model.calibration`` is what it was trained with.

    Raises:
        ValueError: ``prepare_qat`` did not prepare the model.
    """
    stack = encoder_of(model)
    layers = [part for part in linear_layers(stack).values() if isinstance(part, _Rounded)]
    if not layers:
        raise ValueError("the model has no layers of prepare_qat: there is nothing to convert.")
    plain = {rounded: kind for kind, rounded in _ROUNDED.items()}
    for layer in layers:
        layer.__class__ = plain[type(layer)]
        del vars(layer)["read"]
    stack.invalidate_engine()
    return model
