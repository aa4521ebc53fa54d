"""The vocabulary of ``ops/`` in ONNX Runtime's own operators; the only file that knows them."""

from collections.abc import Sequence

import torch
from onnx_ir import DataType
from onnxscript import GraphBuilder

from fastgen.calibration import Range
from fastgen.ops import names
from fastgen.ops.standard import Ops
from fastgen.ops.typed import is_power_of_two
from fastgen.ops.values import Angles, Bias, KVSlots, Value
from fastgen.target import Target


class ContribOps(Ops):
    """Fused operators of com.microsoft, and norms that ONNX Runtime had before the standard."""

    def __init__(self, builder: GraphBuilder, target: Target) -> None:
        super().__init__(builder, target)
        self.contrib = builder.opset("com.microsoft")
        self._seen: dict[Value, Value] = {}
        self._tables: dict[Angles, tuple[Value, Value, Value]] = {}

    def _product(
        self, x: Value, weight: Value, bias: Value | None, scale: float, transposed: bool
    ) -> Value:
        """See ``Ops.linear``. FusedMatMul's alpha is rounded to the compute dtype, so only a power
        of two is exact; on a CPU any but 1 leaves the kernel for single rows."""
        alpha = scale if self.target.device == "cuda" and is_power_of_two(scale) else 1.0
        x = self.cast(self._scaled(x, scale / alpha), weight.dtype or self._compute)
        y = self.contrib.FusedMatMul(x, weight, transB=int(not transposed), alpha=alpha)
        y = y if bias is None else self.onnx.Add(y, bias)
        return self._typed(y, weight.dtype)

    def _integer_product(
        self,
        x: Value,
        known: Range,
        weight: Value,
        bias: Value | None,
        scale: float,
        transposed: bool,
    ) -> Value:
        """See ``Calibrated._integer_product``; one kernel, which adds the bias, too."""
        step, zero = known.asymmetric()
        values, steps = self.rows_of(weight, transposed, inputs_first=True)
        middle = [self.constant(128, torch.uint8)] if self.target.saturates else []
        y = self.contrib.MatMulIntegerToFloat(
            *(self.quantised(x, step, zero), values, self.scalar(scale * step), steps),
            *(self.constant(zero, torch.uint8), *(middle or [None]), bias),
        )
        return self._typed(y, weight.dtype)

    def _integer_attention(
        self,
        factors: Sequence[Value],
        ranges: Sequence[Range],
        bias: Value | None,
        heads: int,
        scale: float,
    ) -> Value:
        """See ``Calibrated._integer_attention``; of uint8 by uint8, which never overflows."""
        steps, zeros = zip(*(known.asymmetric() for known in ranges), strict=True)
        q, k, v = (
            self._split(self.quantised(x, step, zero), heads)
            for x, step, zero in zip(factors, steps, zeros, strict=True)
        )
        keys = self.onnx.Transpose(k, perm=[0, 1, 3, 2])
        scores = self._multiplied(q, keys, steps[0] * scale, steps[1], zeros[0], zeros[1])
        weights = self.quantised(self._weights(scores, bias, 1.0), 1 / 255, 0)
        y = self._multiplied(weights, v, 1 / 255, steps[2], 0, zeros[2])
        return names.give(self._joined(y, y.dtype), names.attention(names.of(factors[0])))

    def _multiplied(
        self, x: Value, y: Value, x_step: float, y_step: float, x_zero: int, y_zero: int
    ) -> Value:
        """The product of two tensors of uint8, in float32."""
        steps = self.scalar(x_step), self.scalar(y_step)
        zeros = self.constant(x_zero, torch.uint8), self.constant(y_zero, torch.uint8)
        return self._typed(self.contrib.MatMulIntegerToFloat(x, y, *steps, *zeros), self._compute)

    def rms_norm(self, x: Value, weight: Value, eps: float) -> Value:
        """See ``Ops.rms_norm``; the kernel gives the weight's dtype."""
        name = names.of_parameter(weight)
        if self._gives(name, weight.dtype) != weight.dtype:
            return super().rms_norm(x, weight, eps)
        normed = self.onnx.SimplifiedLayerNormalization(x, weight, epsilon=eps, axis=-1)
        return names.give(self._typed(normed, weight.dtype), name)

    def add_rms_norm(
        self, residual: Value, x: Value, weight: Value, eps: float
    ) -> tuple[Value, Value]:
        """See ``Ops.add_rms_norm``; one kernel where all share a dtype."""
        if not self._one_dtype(residual, x, weight) or _too_wide(weight):
            return super().add_rms_norm(residual, x, weight, eps)
        normed, _, _, total = self.contrib.SkipSimplifiedLayerNormalization(
            x, residual, weight, epsilon=eps, _outputs=4
        )
        return self._as_norm(total, normed, weight)

    def _one_dtype(self, residual: Value, x: Value, weight: Value) -> bool:
        """Whether a sum and its norm are to be read and given in one dtype."""
        name = names.of_parameter(weight)
        total = self._gives(names.total(name), residual.dtype)
        dtypes = {x.dtype, residual.dtype, weight.dtype, total, self._gives(name, weight.dtype)}
        return len(dtypes) == 1

    def _as_norm(self, total: Value, normed: Value, weight: Value) -> tuple[Value, Value]:
        """Results of one kernel, named."""
        name = names.of_parameter(weight)
        total = names.give(self._typed(total, weight.dtype), names.total(name))
        return total, names.give(self._typed(normed, weight.dtype), name)

    def layer_norm(self, x: Value, weight: Value, bias: Value, eps: float) -> Value:
        """See ``Ops.layer_norm``; the kernel itself computes in float32."""
        name = names.of_parameter(weight)
        if not x.dtype == weight.dtype == self._gives(name, weight.dtype):
            return super().layer_norm(x, weight, bias, eps)
        normed = self.onnx.LayerNormalization(x, weight, bias, epsilon=eps, axis=-1)
        return names.give(self._typed(normed, weight.dtype), name)

    def add_layer_norm(
        self, residual: Value, x: Value, weight: Value, bias: Value, eps: float
    ) -> tuple[Value, Value]:
        """See ``Ops.add_layer_norm``; one kernel where all share a dtype, but on a CPU, where that
        kernel takes several times as long as the two."""
        same = self._one_dtype(residual, x, weight)
        same = same and (self.choice.made or weight.dtype == self._residual)
        if not same or self.target.device == "cpu" or _too_wide(weight):
            return super().add_layer_norm(residual, x, weight, bias, eps)
        normed, _, _, total = self.contrib.SkipLayerNormalization(
            x, residual, weight, bias, epsilon=eps, _outputs=4
        )
        return self._as_norm(total, normed, weight)

    def activation(self, x: Value, name: str) -> Value:
        """See ``Ops.activation``; the kernels themselves compute in float32."""
        own, rule = names.activation(names.of(x)), x.dtype
        (x,) = self._reads(x, result=self._gives(own, rule))
        return self._clamped(self._typed(self._activation(x, name), x.dtype), own, rule)

    def _activation(self, x: Value, name: str) -> Value:
        if name in ("gelu_new", "gelu_pytorch_tanh") and self.target.device == "cuda":
            return self.contrib.FastGelu(x)
        return super()._activation(x, name)

    def _visible(self, x: Value, queries: Value, first_slot: Value, axis: int) -> Value:
        """See ``Ops._visible``; biases by several tables share their slots."""
        if not self.target.appends_in_attention:
            return x
        if x not in self._seen:
            length = self.onnx.Shape(queries, end=1)
            end = self.onnx.Add(self.onnx.Cast(first_slot, to=DataType.INT64), length)
            zero, axes = self.constant([0], torch.int64), self.constant([axis], torch.int64)
            self._seen[x] = self._typed(self.onnx.Slice(x, zero, end, axes), x.dtype)
        return self._seen[x]

    def attention(
        self, q: Value, k: Value, v: Value, bias: Value | None, heads: int, scale: float = 1.0
    ) -> Value:
        if (ranges := self.ranges_of(q, k, v)) is not None:
            return self._integer_attention((q, k, v), ranges, bias, heads, scale)
        name, (q, k, v, bias) = self._factors(q, k, v, bias)
        more = () if bias is None else (None, None, bias)
        y = self.contrib.MultiHeadAttention(q, k, v, *more, num_heads=heads, scale=scale)
        return names.give(self._typed(y, q.dtype), name)

    def cached_attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        slots: KVSlots,
        bias: Bias,
        heads: int,
        scale: float = 1.0,
    ) -> tuple[Value, Value, Value]:
        """See ``Ops.cached_attention``; attention itself may write what it is given."""
        groups = slots.groups
        spelled = self._folded_bias(bias, slots.first_slot, groups)
        q, heads = self._folded(q, groups), heads if groups is None else groups.count
        if self.target.appends_in_attention:
            y, key, value = self.contrib.MultiHeadAttention(
                *(q, k, v, None, None, spelled, slots.key, slots.value, slots.first_slot),
                num_heads=heads,
                scale=scale,
                _outputs=3,
            )
            return self._unfolded(self._typed(y, self._compute), groups), key, value
        k, v = (self.cast(x, self._compute) for x in (k, v))
        key = self.onnx.TensorScatter(slots.key, k, slots.first_slot, axis=1)
        value = self.onnx.TensorScatter(slots.value, v, slots.first_slot, axis=1)
        key, value = (self._typed(x, self._compute) for x in (key, value))
        y = self.attention(q, key, value, spelled, heads, scale)
        return self._unfolded(y, groups), key, value

    def rotary(self, x: Value, angles: Angles, heads: int) -> Value:
        """See ``Ops.rotary``. The kernel finds angles in a table of x's dtype, by row: each token's
        are there as they are."""
        x = self.cast(x, self._compute)
        if angles not in self._tables:
            whole = self.constant([-1, angles.frequencies], torch.int64)
            rows = [
                self.onnx.Reshape(self.cast(turns, self._compute), whole)
                for turns in (angles.cosines, angles.sines)
            ]
            zero, one = (self.constant(n, torch.int64) for n in (0, 1))
            places = self.onnx.Range(zero, self.onnx.Size(angles.positions), one)
            places = self.onnx.Reshape(places, self.onnx.Shape(angles.positions))
            places = self.onnx.Expand(places, self.onnx.Shape(x, end=2))
            self._tables[angles] = places, *rows
        y = self.contrib.RotaryEmbedding(x, *self._tables[angles], num_heads=heads)
        return self._as(y, x)

    def as_kv(self, x: Value, heads: int, head_size: int) -> Value:
        return x if self.target.kv_layout == "BLHD" else super().as_kv(x, heads, head_size)


def _too_wide(weight: Value) -> bool:
    """Whether ONNX Runtime's kernels that add and norm in one read beside such rows: float32 ones
    of 5,120 columns and any of 8,192 on a GPU (1.31)."""
    width = weight.shape[0]
    return not isinstance(width, int) or width > 4096
