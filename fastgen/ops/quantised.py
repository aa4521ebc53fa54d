"""Products by weights of fewer bits (see ``blockwise.py``): the one operation of the vocabulary
that reads them, for each lowering.

A family's ``linear`` names a parameter; where the Target's weights are not full, the graph reads
the values and the scales made of it instead, and the parameter itself only where something else
does (an embedding that shares it).
"""

import math

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder

from fastgen.blockwise import BITS, Format, Kind
from fastgen.ops.contrib import ContribOps
from fastgen.ops.standard import Ops
from fastgen.ops.values import Value
from fastgen.target import Target

_VALUES = {
    "int8": ir.DataType.UINT8,
    "int4": ir.DataType.UINT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}


FORM = "fastgen.form"
"""Under this key a parameter's ``meta`` tells that its model has it in fewer bits, in a Format."""


def lowering(builder: GraphBuilder, target: Target) -> Ops:
    """The vocabulary, lowered to what the Target has: ONNX Runtime has no product by fp8 weights,
    which only the fused kernels multiply by, so its graphs read full ones."""
    if _asked(target) is None and not target.held:
        return ContribOps(builder, target) if target.contrib else Ops(builder, target)
    return QuantisedContribOps(builder, target) if target.contrib else QuantisedOps(builder, target)


def _asked(target: Target) -> Kind | None:
    """What products read in place of weights that the model has in full; None: those."""
    if target.weights == "full" or (target.weights == "fp8" and target.contrib):
        return None
    return target.weights


class QuantisedOps(Ops):
    """Standard operators, which multiply by what values and scales stand for."""

    def _product(
        self, x: Value, weight: Value, bias: Value | None, scale: float, transposed: bool
    ) -> Value:
        """See ``Ops.linear``."""
        form = self._form(weight, transposed)
        if form is None:
            return super()._product(x, weight, bias, scale, transposed)
        return self._product_by(form, x, weight, bias, scale)

    def _product_by(
        self, form: Format, x: Value, weight: Value, bias: Value | None, scale: float
    ) -> Value:
        return super()._product(x, self._spelled_weight(weight, form), bias, scale, False)

    def _form(self, weight: Value, transposed: bool) -> Format | None:
        """What the graph reads in place of a parameter; None: the parameter as it is."""
        form: Format | None = weight.meta.get(FORM)
        kind = _asked(self.target)
        if form is not None or kind is None:
            return form
        return Format(kind, self.target.group, transposed)

    def _made(self, weight: Value, form: Format) -> list[Value]:
        """The initializers that stand for a parameter: values, scales and, if it has any, zeros."""
        scale_type = ir.DataType.FLOAT if form.kind == "fp8" else weight.dtype
        types = _VALUES[form.kind], scale_type, ir.DataType.UINT8
        parts = zip(form.names(str(weight.name)), form.shapes(*_sizes(weight, form)), strict=True)
        return [self.declared(name, types[i], shape) for i, (name, shape) in enumerate(parts)]

    def _spelled_weight(self, weight: Value, form: Format) -> Value:
        """The weight [out, in] that values, scales and zeros stand for, in its dtype."""
        values, scales, *zeros = self._made(weight, form)
        dtype, (outputs, inputs) = weight.dtype, _sizes(weight, form)
        if form.kind == "fp8":
            wide = self.onnx.Mul(self.onnx.Cast(values, to=ir.DataType.FLOAT), scales)
            whole = self.cast(self._typed(wide, ir.DataType.FLOAT), dtype)
        else:
            steps, last = self._steps(values, form, dtype), self.constant([-1], torch.int64)
            middle = self.scalar(2.0 ** (BITS[form.kind] - 1), dtype)
            if zeros:
                middle = self._steps(zeros[0], form, dtype)
                if form.kind == "int4":  # one too many where they are odd
                    bounds = ([0], [math.ceil(inputs / form.group)], [1])
                    middle = self._sliced(middle, *bounds)
                middle = self.onnx.Unsqueeze(middle, last)
            centred = self.onnx.Sub(steps, middle)
            blocks = self.onnx.Mul(centred, self.onnx.Unsqueeze(scales, last))
            whole = self.onnx.Reshape(blocks, self.constant([outputs, -1], torch.int64))
            if inputs % form.group:
                whole = self._sliced(whole, [0], [inputs], [1])
        whole.shape = ir.Shape((outputs, inputs))
        return self._typed(whole, dtype)

    def _sliced(self, x: Value, *bounds: list[int]) -> Value:
        """Starts, ends and axes of what is kept."""
        return self.onnx.Slice(x, *(self.constant(b, torch.int64) for b in bounds))

    def _steps(self, values: Value, form: Format, dtype: ir.DataType | None) -> Value:
        """Values or zeros as numbers, [.., n]: of int4 two a byte, the even one in the low bits.
        All are exact in any dtype."""
        pairs = self._typed(self.onnx.Cast(values, to=dtype), dtype)
        if form.kind != "int4":
            return pairs
        sixteen = self.scalar(16.0, dtype)
        high = self.onnx.Floor(self.onnx.Div(pairs, sixteen))
        low = self.onnx.Sub(pairs, self.onnx.Mul(high, sixteen))
        last = self.constant([-1], torch.int64)
        parts = [self.onnx.Unsqueeze(part, last) for part in (low, high)]
        assert values.shape is not None
        shape = self.constant([*values.shape[:-1], 2 * int(values.shape[-1])], torch.int64)
        return self._typed(self.onnx.Reshape(self.onnx.Concat(*parts, axis=-1), shape), dtype)


class QuantisedContribOps(QuantisedOps, ContribOps):
    """ONNX Runtime's MatMulNBits."""

    def _product_by(
        self, form: Format, x: Value, weight: Value, bias: Value | None, scale: float
    ) -> Value:
        """See ``Ops.linear``. Where a CPU is asked for weights of fewer bits, blocks of the input
        are rounded to 8 bits, too, as only such kernels are much faster there than those of full
        weights; by a checkpoint's, inputs in float32 are multiplied as they are."""
        made, (outputs, inputs) = self._made(weight, form), _sizes(weight, form)
        x = self.cast(self._scaled(x, scale), weight.dtype or self._compute)
        bits = BITS[form.kind]
        if form.halves:
            x, inputs, bits = self._twice(x, inputs, form.group), 2 * inputs, bits // 2
            inputs += -inputs % (2 * form.group)
        rounds = 1 if self.target.weights == "full" else 4
        level = {"accuracy_level": rounds} if self.target.device == "cpu" else {}
        sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": form.group}
        y = self.contrib.MatMulNBits(x, *made, **sizes, **level)
        y = y if bias is None else self.onnx.Add(y, bias)
        return self._typed(y, weight.dtype)

    def _twice(self, x: Value, inputs: int, group: int) -> Value:
        """[B, Q, K] -> [B, Q, 2 * K], for the high and the low halves of a weight; K is filled up
        with zeros to whole blocks."""
        if inputs % group:
            ends = self.constant([0, 0, 0, 0, 0, -inputs % group], torch.int64)
            x = self._as(self.onnx.Pad(x, ends), x)
        return self._as(self.onnx.Concat(x, x, axis=-1), x)


def _sizes(weight: Value, form: Format) -> tuple[int, int]:
    """Outputs and inputs of a weight."""
    assert weight.shape is not None
    sizes = [int(size) for size in weight.shape]
    return (sizes[1], sizes[0]) if form.transposed else (sizes[0], sizes[1])
