"""Values of a graph that is being written, and their dtypes: what all lowerings are made of."""

import math
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder

from fastgen.ops import names
from fastgen.ops.values import Value
from fastgen.target import Target

_TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


class Typed:
    """Makes values whose dtype is known; casts appear only where dtypes really differ."""

    def __init__(self, builder: GraphBuilder, target: Target) -> None:
        self.builder = builder
        self.target = target
        self.onnx = builder.op
        self._compute = ir.DataType[_ir_name(target.dtype)]
        self._residual = ir.DataType[_ir_name(target.residual_dtype)]
        self.choice = names.Choice(target)
        self._casts: dict[tuple[Value, ir.DataType], Value] = {}

    def constant(self, values: Any, dtype: torch.dtype) -> Value:
        """A small constant tensor."""
        tensor = torch.as_tensor(values, dtype=dtype)
        name = f"constant_{len(self.builder.graph.initializers)}"
        return self.builder.initializer(ir.tensor(tensor, name=name), qualify=False)

    def scalar(self, value: float, dtype: ir.DataType | None = None) -> Value:
        """A scalar; of the compute dtype unless said."""
        return self.constant(value, _TORCH_DTYPES[dtype or self._compute])

    def cast(self, x: Value, dtype: ir.DataType) -> Value:
        """``x`` in a dtype; where operations are chosen, once for all that read it, and never back
        from what it was cast to."""
        if x.dtype == dtype:
            return x
        if not self.choice.made:
            return self._cast(x, dtype)
        if (x, dtype) not in self._casts:
            made = self._casts[x, dtype] = self._cast(x, dtype)
            self._casts[made, x.dtype] = x
        return self._casts[x, dtype]

    def _cast(self, x: Value, dtype: ir.DataType) -> Value:
        if x.dtype == dtype:
            return x
        made = self._as(self.onnx.Cast(x, to=dtype), x, dtype)
        made.shape = x.shape
        return made

    def _typed(self, value: Value, dtype: ir.DataType | None) -> Value:
        value.type = ir.TensorType(dtype or self._compute)
        return value

    def _as(self, value: Value, x: Value, dtype: ir.DataType | None = None) -> Value:
        """Numbers of ``x``, by the name of what gave it, in its dtype unless said."""
        return names.give(self._typed(value, dtype or x.dtype), names.of(x))

    def output(self, x: Value, dtype: ir.DataType) -> Value:
        """``x`` as a graph gives it."""
        return self.cast(x, dtype) if self.choice.made else x

    def given(self, x: Value, name: str, rule: ir.DataType) -> Value:
        """The result of an operation, in the dtype that is chosen for it, or else by the rule."""
        return names.give(self.cast(x, self._gives(name, rule)), name)

    def _gives(self, name: str, rule: ir.DataType) -> ir.DataType:
        narrow = self._compute if self.choice.made else rule
        return ir.DataType.FLOAT if name in self.choice else narrow

    def _reads(self, *values: Value, result: ir.DataType) -> list[Value]:
        """Where operations are chosen, what a computation reads in float32, if any of it or its
        result is."""
        if self.choice.made and ir.DataType.FLOAT in {result, *(x.dtype for x in values)}:
            return [self.cast(x, ir.DataType.FLOAT) for x in values]
        return [*values]

    def _softmax(self, scores: Value, dtype: ir.DataType) -> Value:
        """Softmax over the last axis, in float32; given in a dtype."""
        wide = self.onnx.Softmax(self.cast(scores, ir.DataType.FLOAT), axis=-1)
        return self.cast(self._typed(wide, ir.DataType.FLOAT), dtype)

    def _scaled(self, x: Value, scale: float) -> Value:
        """``scale * x``: in float32, as a rounded scale would shift all results; but a power of two
        in x's dtype, since TensorRT makes that a factor of the float32 accumulator."""
        if scale == 1.0:
            return x
        dtype = x.dtype if is_power_of_two(scale) else ir.DataType.FLOAT
        return self._typed(self.onnx.Mul(self.cast(x, dtype), self.scalar(scale, dtype)), dtype)


def is_power_of_two(scale: float) -> bool:
    """Whether multiplying by it rounds nothing (but what becomes subnormal)."""
    return math.frexp(scale)[0] == 0.5


def _ir_name(dtype: str) -> str:
    return {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[dtype]
