"""Products of 8-bit integers, where a Target's calibration knows the ranges of activations: which
ranges those are, and how standard ONNX has them (QuantizeLinear and DequantizeLinear).
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder

from fastgen.calibration import Range
from fastgen.int8 import Rows
from fastgen.ops import names
from fastgen.ops.typed import Typed
from fastgen.ops.values import Value
from fastgen.target import Target

# A weight's own steps are multiplied by behind the product, as TensorRT wants constants within it.
# This one keeps the product of integers within float16's range.
_WEIGHT_STEP = 2.0**-10


class Calibrated(Typed):
    """The part of the vocabulary that knows of calibration; ``Ops`` has the rest."""

    _unflatten: Any
    _split: Any
    _joined: Any

    def __init__(self, builder: GraphBuilder, target: Target) -> None:
        super().__init__(builder, target)
        self.made: dict[str, Value] = {}
        """What the graph reads that is made of parameters, by name (see ``quantised.py``)."""
        self._integers: dict[tuple[Value, float, int], Value] = {}
        self._back: dict[Value, Value] = {}
        self._read: dict[Value, Range] = {}

    def read_by(self, layer: str, x: Value) -> Range | None:
        """The range of ``x``, which a linear layer reads; None if that is not known. What else
        reads ``x`` may ask for it, too."""
        known = self.target.calibration
        found = None if known is None else known.inputs.get(layer)
        if found is not None:
            self._read.setdefault(x, found)
        return found

    def range_of(self, x: Value) -> Range | None:
        """Of a linear layer's input or result."""
        known = self.target.calibration
        if x in self._read or known is None:
            return self._read.get(x)
        return known.outputs.get(names.of(x))

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
        values, steps = form.names(str(weight.name))
        shape = (inputs, outputs) if inputs_first else (outputs, inputs)
        return self.declared(values, kind, shape), self.declared(steps, weight.dtype, (outputs,))

    def declared(self, name: str, dtype: ir.DataType | None, shape: tuple[int, ...]) -> Value:
        """A tensor that is made of a parameter, as the graph reads it; once for all who do."""
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
            self._back[integers] = self._as(y, x, dtype)
        return self._back[integers]

    def addends(self, residual: Value, x: Value) -> tuple[Value, Value]:
        """What a residual stream adds, rounded where the calibration asks for that."""
        known = self.target.calibration
        if known is None or not known.residuals:
            return residual, x
        ranges = self.range_of(residual), self.range_of(x)
        rounded = (
            value if found is None else self.rounded(value, found)
            for value, found in zip((residual, x), ranges, strict=True)
        )
        return next(rounded), next(rounded)

    def ranges_of(self, *factors: Value) -> list[Range] | None:
        """Of queries, keys and values; None if attention computes without them."""
        known = self.target.calibration
        if known is None or not known.attention:
            return None
        found = [known for known in map(self.range_of, factors) if known is not None]
        return found if len(found) == len(factors) else None

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
        y = self._joined(self.onnx.MatMul(weights, v), self._compute)
        return names.give(y, names.attention(names.of(factors[0])))

    def _weights(self, scores: Value, bias: Value | None, scale: float) -> Value:
        """What attention multiplies values by, of its scores [B, H, Q, K]."""
        scores = self._scaled(scores, scale)
        if bias is not None:
            scores = self.onnx.Add(self.cast(scores, bias.dtype), bias)
            scores = self._typed(scores, bias.dtype)
        return self._softmax(scores, self._compute)

    def _integer_product(
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
