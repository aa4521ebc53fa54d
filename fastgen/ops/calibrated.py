"""Products of 8-bit integers, where a Target's calibration knows the ranges of activations: which
ranges those are, and how standard ONNX has them (QuantizeLinear and DequantizeLinear).
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from fastgen.calibration import Range
from fastgen.int8 import Rows
from fastgen.ops.values import Value
from fastgen.target import Target

# A weight's own steps are multiplied by behind the product, as TensorRT wants constants within it.
# This one keeps the product of integers within float16's range.
_WEIGHT_STEP = 2.0**-10


class Calibrated:
    """The part of the vocabulary that knows of calibration; ``Ops`` has the rest."""

    onnx: Any
    constant: Any
    scalar: Any
    cast: Any
    _scaled: Any
    _typed: Any
    _unflatten: Any
    made: dict[str, Value]
    _split: Any
    _merged: Any
    _compute: ir.DataType

    def __init__(self, target: Target) -> None:
        self.target = target
        self._integers: dict[tuple[Value, float, int], Value] = {}
        self._back: dict[Value, Value] = {}
        self._ranges: dict[Value, Range] = {}

    def input_range(self, weight: Value) -> Range | None:
        """What a linear layer reads, by its weight; None if that is not known."""
        known = self.target.calibration
        return None if known is None else known.inputs.get(_layer(weight))

    def noted(self, x: Value, weight: Value, y: Value) -> Value:
        """``y``, as what a layer made of ``x``: what else reads the two may ask for their range."""
        known = self.target.calibration
        for value, ranges in ((x, known and known.inputs), (y, known and known.outputs)):
            if ranges and (found := ranges.get(_layer(weight))) is not None:
                self._ranges.setdefault(value, found)
        return y

    def rows_of(
        self, weight: Value, transposed: bool, inputs_first: bool = False
    ) -> tuple[Value, Value]:
        """A weight as 8-bit integers, and the step of each of its N outputs, in its dtype.

        Args:
            transposed: the weight is [in, out].
            inputs_first: gives [in, out] integers, else [out, in].
        """
        form = Rows(transposed, inputs_first, self.target.saturates)
        axes = tuple(weight.shape)
        outputs, inputs = axes[::-1] if transposed else axes
        kind = ir.DataType.UINT8 if form.unsigned else ir.DataType.INT8
        values, steps = form.names(weight.name)
        shape = (inputs, outputs) if inputs_first else (outputs, inputs)
        return self._tensor(values, kind, shape), self._tensor(steps, weight.dtype, (outputs,))

    def _tensor(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> Value:
        if name not in self.made:
            self.made[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        return self.made[name]

    def quantised(self, x: Value, step: float, zero: int | None) -> Value:
        """``x`` as uint8 around ``zero``, or as int8 around 0 if that is None; once for all who
        read it so."""
        key = x, step, -1 if zero is None else zero
        if key not in self._integers:
            of = (0, torch.int8) if zero is None else (zero, torch.uint8)
            dtype = x.dtype or self._compute
            y = self.onnx.QuantizeLinear(x, self.scalar(step, dtype), self.constant(*of))
            kind = ir.DataType.INT8 if zero is None else ir.DataType.UINT8
            self._integers[key] = self._typed(y, kind)
        return self._integers[key]

    def rounded(self, x: Value, known: Range) -> Value:
        """``x`` to the nearest of int8's 255 steps within a range: what TensorRT takes as integers
        in whatever reads it."""
        step, dtype = known.symmetric(), x.dtype or self._compute
        integers = self.quantised(x, step, None)
        if integers not in self._back:
            y = self.onnx.DequantizeLinear(integers, self.scalar(step, dtype))
            self._back[integers] = self._typed(y, dtype)
        return self._back[integers]

    def passed(self, x: Value, y: Value) -> Value:
        """``y``, as numbers of ``x`` in other places."""
        if x in self._ranges:
            self._ranges[y] = self._ranges[x]
        return y

    def addends(self, residual: Value, x: Value) -> tuple[Value, Value]:
        """What a residual stream adds, rounded where the calibration asks for that."""
        known = self.target.calibration
        if known is None or not known.residuals:
            return residual, x
        rounded = (
            self.rounded(value, self._ranges[value]) if value in self._ranges else value
            for value in (residual, x)
        )
        return next(rounded), next(rounded)

    def factors(self, *factors: Value) -> list[Range] | None:
        """Ranges of queries, keys and values; None if attention computes without them."""
        known = self.target.calibration
        asked = known is not None and known.attention and all(x in self._ranges for x in factors)
        return [self._ranges[x] for x in factors] if asked else None

    def _integer_attention(
        self,
        factors: Sequence[Value],
        ranges: Sequence[Range],
        bias: Value | None,
        heads: int,
        scale: float,
    ) -> Value:
        """``Ops.attention`` of queries, keys and values [B, .., H*D] whose ranges are known."""
        q, k, v = (
            self._split(self.rounded(x, known), heads)
            for x, known in zip(factors, ranges, strict=True)
        )
        keys = self._typed(self.onnx.Transpose(k, perm=[0, 1, 3, 2]), k.dtype)
        scores = self._typed(self.onnx.MatMul(q, keys), self._compute)
        weights = self.rounded(self._weights(scores, bias, scale), Range(0.0, 1.0))
        return self._merged(self.onnx.MatMul(weights, v))

    def _weights(self, scores: Value, bias: Value | None, scale: float) -> Value:
        """What attention multiplies values by, of its scores [B, H, Q, K]: Softmax in float32."""
        scores = self._scaled(scores, scale)
        if bias is not None:
            scores = self.onnx.Add(self.cast(scores, bias.dtype), bias)
            scores = self._typed(scores, bias.dtype)
        wide = self.onnx.Softmax(self.cast(scores, ir.DataType.FLOAT), axis=-1)
        return self.cast(self._typed(wide, ir.DataType.FLOAT), self._compute)

    def _integer_linear(
        self,
        x: Value,
        known: Range,
        weight: Value,
        bias: Value | None,
        scale: float,
        transposed: bool,
    ) -> Value:
        """``Ops.linear`` of an ``x`` whose range is known."""
        dtype = weight.dtype or self._compute
        x = self.cast(x, dtype)
        rows = self._typed(self.onnx.Flatten(self.rounded(x, known), axis=2), dtype)
        values, steps = self.rows_of(weight, transposed)
        whole = self.onnx.DequantizeLinear(values, self.scalar(_WEIGHT_STEP, dtype))
        y = self._typed(self.onnx.Gemm(rows, whole, transB=1), dtype)
        steps = self._scaled(steps, scale / _WEIGHT_STEP)
        y = self._typed(self.onnx.Mul(y, self.cast(steps, dtype)), dtype)
        y = y if bias is None else self.onnx.Add(y, bias)
        return self._typed(self._unflatten(y, x, weight.shape[int(transposed)]), dtype)


def _layer(weight: Value) -> str:
    return str(weight.name).removesuffix(".weight")
