"""Products by weights of fewer bits (see ``blockwise.py``): the one operation of the vocabulary
that reads them, for each lowering.

A family's ``linear`` names a parameter; where the Target's weights are not full, the graph reads
the values and the scales made of it instead, and the parameter itself only where something else
does (an embedding that shares it).
"""

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder

from fastgen.blockwise import BITS, Format
from fastgen.ops.contrib import ContribOps
from fastgen.ops.standard import Ops
from fastgen.ops.values import Value
from fastgen.target import Target

_VALUES = {
    "int8": ir.DataType.UINT8,
    "int4": ir.DataType.UINT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}


def lowering(builder: GraphBuilder, target: Target) -> Ops:
    """The vocabulary, lowered to what the Target has: ONNX Runtime has no product by fp8 weights,
    which only the fused kernels multiply by, so its graphs read full ones."""
    if target.weights == "full" or (target.weights == "fp8" and target.contrib):
        return ContribOps(builder, target) if target.contrib else Ops(builder, target)
    return QuantisedContribOps(builder, target) if target.contrib else QuantisedOps(builder, target)


class QuantisedOps(Ops):
    """Standard operators, which multiply by what values and scales stand for."""

    def _product(
        self, x: Value, weight: Value, bias: Value | None, scale: float, transposed: bool
    ) -> Value:
        """See ``Ops.linear``."""
        return super()._product(x, self._spelled_weight(weight, transposed), bias, scale, False)

    def _made(self, weight: Value, transposed: bool) -> tuple[Value, Value]:
        """The initializers that stand for a parameter in the Target's format."""
        kind = self.target.weights
        assert kind != "full"
        form = Format(kind, self.target.group, transposed)
        values, scales = form.names(str(weight.name))
        shapes = form.shapes(*_sizes(weight, transposed))
        scale_type = ir.DataType.FLOAT if kind == "fp8" else weight.dtype
        return (
            self.declared(values, _VALUES[kind], shapes[0]),
            self.declared(scales, scale_type, shapes[1]),
        )

    def _spelled_weight(self, weight: Value, transposed: bool) -> Value:
        """The weight [out, in] that the values and scales stand for, in its dtype."""
        values, scales = self._made(weight, transposed)
        dtype, (outputs, inputs) = weight.dtype, _sizes(weight, transposed)
        if self.target.weights == "fp8":
            wide = self.onnx.Mul(self.onnx.Cast(values, to=ir.DataType.FLOAT), scales)
            whole = self.cast(self._typed(wide, ir.DataType.FLOAT), dtype)
        else:
            centre = 2.0 ** (BITS[self.target.weights] - 1)
            steps = self._typed(self.onnx.Cast(values, to=dtype), dtype)
            if self.target.weights == "int4":
                steps = self._halves(steps)
            centred = self.onnx.Sub(steps, self.scalar(centre, dtype))
            last = self.constant([-1], torch.int64)
            blocks = self.onnx.Mul(centred, self.onnx.Unsqueeze(scales, last))
            whole = self.onnx.Reshape(blocks, self.constant([outputs, -1], torch.int64))
            if inputs % self.target.group:
                bounds = ([0], [inputs], [1])
                whole = self.onnx.Slice(whole, *(self.constant(b, torch.int64) for b in bounds))
        whole.shape = ir.Shape((outputs, inputs))
        return self._typed(whole, dtype)

    def _halves(self, pairs: Value) -> Value:
        """[N, blocks, G / 2] bytes as numbers -> [N, blocks, G / 2, 2] of their low and high four
        bits; all are exact in any dtype."""
        sixteen = self.scalar(16.0, pairs.dtype)
        high = self.onnx.Floor(self.onnx.Div(pairs, sixteen))
        low = self.onnx.Sub(pairs, self.onnx.Mul(high, sixteen))
        last = self.constant([-1], torch.int64)
        parts = [self.onnx.Unsqueeze(part, last) for part in (low, high)]
        shape = self.constant([0, 0, self.target.group], torch.int64)
        whole = self.onnx.Reshape(self.onnx.Concat(*parts, axis=-1), shape)
        return self._typed(whole, pairs.dtype)


class QuantisedContribOps(QuantisedOps, ContribOps):
    """ONNX Runtime's MatMulNBits."""

    def _product(
        self, x: Value, weight: Value, bias: Value | None, scale: float, transposed: bool
    ) -> Value:
        """See ``Ops.linear``. On a CPU blocks of the input are rounded to 8 bits, too, as only such
        kernels are faster there than those of full weights."""
        values, scales = self._made(weight, transposed)
        outputs, inputs = _sizes(weight, transposed)
        x = self.cast(self._scaled(x, scale), weight.dtype or self._compute)
        level = {"accuracy_level": 4} if self.target.device == "cpu" else {}
        y = self.contrib.MatMulNBits(
            *(x, values, scales),
            K=inputs,
            N=outputs,
            bits=BITS[self.target.weights],
            block_size=self.target.group,
            **level,
        )
        y = y if bias is None else self.onnx.Add(y, bias)
        return self._typed(y, weight.dtype)


def _sizes(weight: Value, transposed: bool) -> tuple[int, int]:
    """Outputs and inputs of a weight."""
    assert weight.shape is not None
    sizes = [int(size) for size in weight.shape]
    return (sizes[1], sizes[0]) if transposed else (sizes[0], sizes[1])
