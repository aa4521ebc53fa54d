"""The vocabulary families are written in, lowered to standard ONNX.

``contrib.py`` lowers the same vocabulary to ONNX Runtime's own operators, where there are any.

Shapes: B batch rows, Q query tokens, L KV cache slots, K keys read, H heads, D head size, E model
width. Every value carries its dtype, so that casts appear only where dtypes really differ.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder

from fastgen.errors import UnsupportedConfigError
from fastgen.ops import names
from fastgen.ops.calibrated import Calibrated
from fastgen.ops.heads import Heads
from fastgen.ops.values import Bias, KVSlots, Value
from fastgen.target import Target

# A wide result is scaled before it becomes float16: up to 16 million fits, and what small ones lose
# (8e-6) is far below the residual stream they are added to.
WIDE_SCALE = 2.0**-8
_CACHED_SCALE = 2.0**-2  # a power of two: rounds nothing


class Ops(Heads, Calibrated):
    """Operations lowered for one Target; passed as ``op`` to every module's ``forward``."""

    def __init__(self, builder: GraphBuilder, target: Target) -> None:
        super().__init__(builder, target)
        self._spelled: dict[Bias, Value] = {}
        self._tiled: dict[tuple[Bias, int], Value] = {}

    # Layers

    def embedding(self, ids: Value, weight: Value, scale: float = 1.0, offset: int = 0) -> Value:
        """``scale * weight[ids + offset]``: [B, Q] -> [B, Q, E] in the residual stream's dtype."""
        if offset:
            ids = self.onnx.Add(ids, self.constant(offset, torch.int64))
        rows = self._typed(self.onnx.Gather(weight, ids, axis=0), weight.dtype)
        return self.given(self._scaled(rows, scale), names.of_parameter(weight), self._residual)

    def linear(
        self,
        x: Value,
        weight: Value,
        bias: Value | None = None,
        scale: float = 1.0,
        transposed: bool = False,
    ) -> Value:
        """``scale * x @ weight.T + bias`` with torch's [out, in] weight, in the weight's dtype
        unless another is chosen; ``transposed``: the weight is [in, out]. Of 8-bit integers where
        the Target's calibration knows the range of ``x``."""
        name = names.of_parameter(weight)
        if name in self.choice:
            return names.give(self._wide_product(x, weight, bias, scale, transposed), name)
        if (known := self.read_by(name, x)) is None:
            y = self._product(x, weight, bias, scale, transposed)
        else:
            y = self._integer_product(x, known, weight, bias, scale, transposed)
        return self.given(y, name, y.dtype)

    def _product(
        self, x: Value, weight: Value, bias: Value | None, scale: float, transposed: bool
    ) -> Value:
        dtype = weight.dtype or self._compute
        x = self.cast(self._scaled(x, scale), dtype)
        rows = self._typed(self.onnx.Flatten(x, axis=2), dtype)
        wide = ir.DataType.FLOAT if dtype == ir.DataType.FLOAT16 else dtype
        # TensorRT takes such casts around a product as: float16, accumulated in float32. They must
        # be next to the Gemm, or it would really cast the weight.
        factors = [self._cast(value, wide) for value in (rows, weight)]
        addend = [] if bias is None else [self._cast(bias, wide)]
        y = self.onnx.Gemm(*factors, *addend, transB=int(not transposed))
        y = self._cast(self._typed(y, wide), dtype)
        return self._typed(self._unflatten(y, x, weight.shape[int(transposed)]), dtype)

    def split(self, x: Value, parts: int) -> list[Value]:
        """[B, Q, parts * E] -> parts of [B, Q, E]."""
        pieces = self.onnx.Split(x, num_outputs=parts, axis=-1, _outputs=parts)
        return [self._as(piece, x) for piece in pieces]

    def rows_kept(self, x: Value, kept: Value) -> Value:
        """[B, Q, E], [K] query tokens -> [B, K, E]."""
        return self._as(self.onnx.Gather(x, kept, axis=1), x)

    def _unflatten(self, rows: Value, x: Value, width: int) -> Value:
        """[B * Q, width] rows back to [B, Q, width], as in ``x``."""
        batch = self.onnx.Shape(x, start=0, end=2)
        shape = self.onnx.Concat(batch, self.constant([width], torch.int64), axis=0)
        return self.onnx.Reshape(rows, shape)

    def wide_linear(self, x: Value, weight: Value) -> Value:
        """A linear whose result may exceed float16's range; given in the residual dtype, unless
        another is chosen."""
        if self.choice.made:
            return self.linear(x, weight)
        if weight.dtype != ir.DataType.FLOAT16:
            return self.as_residual(self.linear(x, weight))
        y = self._wide_product(x, weight, None, 1.0, transposed=False)
        return names.give(self.cast(y, self._residual), names.of_parameter(weight))

    def _wide_product(
        self, x: Value, weight: Value, bias: Value | None, scale: float, transposed: bool
    ) -> Value:
        """As ``_product``; of a float16 weight in float32, and beyond what fits float16."""
        if weight.dtype != ir.DataType.FLOAT16:
            return self._product(x, weight, bias, scale, transposed)
        if not self.target.narrow and names.product(names.of_parameter(weight)) in self.choice:
            weight = self.cast(weight, ir.DataType.FLOAT)
            bias = None if bias is None else self.cast(bias, ir.DataType.FLOAT)
            return self._product(x, weight, bias, scale, transposed)
        if x.dtype == ir.DataType.FLOAT:  # which may exceed the range itself
            x, by = self._scaled(x, WIDE_SCALE), scale
        else:
            by = scale * WIDE_SCALE
        y = self.cast(self._product(x, weight, None, by, transposed), ir.DataType.FLOAT)
        unscale = self.constant(1 / WIDE_SCALE, torch.float32)
        y = self._typed(self.onnx.Mul(y, unscale), ir.DataType.FLOAT)
        if bias is None:
            return y
        bias = self.cast(bias, ir.DataType.FLOAT)
        return self._typed(self.onnx.Add(y, bias), ir.DataType.FLOAT)

    def rms_norm(self, x: Value, weight: Value, eps: float) -> Value:
        """Root-mean-square norm, computed in float32; from residual to compute dtype."""
        wide = [self.cast(value, ir.DataType.FLOAT) for value in (x, weight)]
        normed = self.onnx.RMSNormalization(*wide, epsilon=eps, axis=-1)
        normed = self._typed(normed, ir.DataType.FLOAT)
        return self.given(normed, names.of_parameter(weight), weight.dtype)

    def add_rms_norm(
        self, residual: Value, x: Value, weight: Value, eps: float
    ) -> tuple[Value, Value]:
        """``residual + x`` and its norm."""
        total = self._sum(residual, x, weight)
        return total, self.rms_norm(total, weight, eps)

    def _sum(self, residual: Value, x: Value, norm: Value) -> Value:
        """What the norm of this weight reads."""
        residual, x = self.addends(residual, x)
        name = names.total(names.of_parameter(norm))
        dtype = self._gives(name, self._residual)
        terms = self._reads(residual, x, result=dtype)
        if not self.choice.made:
            terms = [self.cast(term, dtype) for term in terms]
        total = self._typed(self.onnx.Add(*terms), terms[0].dtype)
        return self.given(total, name, dtype)

    def layer_norm(self, x: Value, weight: Value, bias: Value, eps: float) -> Value:
        """Mean and variance norm, computed in float32; from any dtype to the weight's."""
        wide = [self.cast(value, ir.DataType.FLOAT) for value in (x, weight, bias)]
        normed = self.onnx.LayerNormalization(*wide, epsilon=eps, axis=-1)
        normed = self._typed(normed, ir.DataType.FLOAT)
        return self.given(normed, names.of_parameter(weight), weight.dtype)

    def add_layer_norm(
        self, residual: Value, x: Value, weight: Value, bias: Value, eps: float
    ) -> tuple[Value, Value]:
        """``residual + x`` in the residual dtype, and its norm."""
        total = self._sum(residual, x, weight)
        return total, self.layer_norm(total, weight, bias, eps)

    def activation(self, x: Value, name: str) -> Value:
        """An activation by its name in transformers' ACT2FN, computed in float32 as torch does;
        float16 results stay finite."""
        wide = x if name == "relu" else self.cast(x, ir.DataType.FLOAT)
        y = self._typed(self._activation(wide, name), wide.dtype)
        return self._clamped(y, names.activation(names.of(x)), x.dtype)

    def _activation(self, x: Value, name: str) -> Value:
        if name == "relu":
            return self.onnx.Relu(x)
        if name in ("gelu_new", "gelu_pytorch_tanh"):
            return self.onnx.Gelu(x, approximate="tanh")
        if name == "gelu":
            return self.onnx.Gelu(x)
        if name in ("silu", "swish"):
            return self.onnx.Mul(x, self.onnx.Sigmoid(x))
        if name == "tanh":
            return self.onnx.Tanh(x)
        raise UnsupportedConfigError(
            f"dense_act_fn={name!r}: the engine knows relu, gelu, gelu_new, gelu_pytorch_tanh, "
            "silu, swish and tanh."
        )

    def multiply(self, x: Value, y: Value) -> Value:
        name = names.multiply(names.of(x))
        x, y = self._reads(x, y, result=self._gives(name, x.dtype))
        return self._clamped(self._typed(self.onnx.Mul(x, y), x.dtype), name, x.dtype)

    def _clamped(self, x: Value, name: str, rule: ir.DataType) -> Value:
        return names.give(self._finite(self.given(x, name, rule)), name)

    def _finite(self, x: Value) -> Value:
        """Clamp float16 to its finite range, as stock T5 does: inf - inf would become NaN."""
        if x.dtype != ir.DataType.FLOAT16:
            return x
        largest = torch.finfo(torch.float16).max
        return self._typed(self.onnx.Clip(x, self.scalar(-largest), self.scalar(largest)), x.dtype)

    # Attention

    def position_table(self, weight: Value, buckets: Sequence[int], future: int | None) -> Value:
        """Bias by relative position, [1, H, len(buckets)], indexed as Python lists are: key minus
        query position, negative from the end; ``future`` is the index that no query may see."""
        ids = self.constant(list(buckets), torch.int64)
        rows = self._typed(self.onnx.Gather(weight, ids, axis=0), weight.dtype)
        table = self.onnx.Transpose(rows, perm=[1, 0])
        if future is not None:
            hidden = [0.0] * len(buckets)
            hidden[future] = float("-inf")
            table = self.onnx.Add(table, self.constant(hidden, getattr(torch, self.target.dtype)))
        axis = self.constant([0], torch.int64)
        return self._typed(self.onnx.Unsqueeze(table, axis), self._compute)

    def position_bias(
        self, table: Value, query_positions: Value, key_positions: Value, low: int, high: int
    ) -> Value:
        """[1, H, table], [Q, 1], [1, K] -> additive bias [1, H, Q, K]."""
        distance = self.onnx.Sub(key_positions, query_positions)
        clipped = self.onnx.Clip(
            distance, self.constant(low, torch.int64), self.constant(high, torch.int64)
        )
        return self._typed(self.onnx.Gather(table, clipped, axis=2), self._compute)

    def mask_bias(self, attention_mask: Value) -> Value:
        """[B, K] of 1 (see) and 0 (hide) -> additive [B, 1, 1, K], finite in every dtype."""
        visible = self.onnx.Cast(attention_mask, to=ir.DataType.BOOL)
        hidden = torch.finfo(getattr(torch, self.target.dtype)).min / 2
        bias = self.onnx.Where(visible, self.scalar(0.0), self.scalar(hidden))
        axes = self.constant([1, 2], torch.int64)
        return self._typed(self.onnx.Unsqueeze(bias, axes), self._compute)

    def causal_bias(self, query_positions: Value, key_positions: Value) -> Value:
        """[Q, 1], [1, K] -> additive bias [1, 1, Q, K] that hides later keys."""
        later = self.onnx.Greater(key_positions, query_positions)
        bias = self.onnx.Where(later, self.scalar(float("-inf")), self.scalar(0.0))
        axes = self.constant([0, 1], torch.int64)
        return self._typed(self.onnx.Unsqueeze(bias, axes), self._compute)

    def row_positions(self, query_positions: Value, row_start: Value | None) -> Value:
        """[Q, 1] places, rows' starts [B, 1] -> positions in their rows [B, Q], at least 0; where
        all rows start at 0, [1, Q]."""
        positions = self.onnx.Reshape(query_positions, self.constant([1, -1], torch.int64))
        if row_start is not None:
            behind = self.onnx.Sub(positions, row_start)
            positions = self.onnx.Max(behind, self.constant([0], torch.int64))
        return self._typed(positions, ir.DataType.INT64)

    def for_queries(self, mask: Value, query_positions: Value) -> Value:
        """[B, 1, 1, K] -> [B, 1, Q, K], with one row of ``query_positions`` [Q, 1] a query."""
        ones, last = self.constant([1, 1], torch.int64), self.constant([1], torch.int64)
        shape = self.onnx.Concat(ones, self.onnx.Shape(query_positions, end=1), last, axis=0)
        return self._typed(self.onnx.Expand(mask, shape), mask.dtype)

    def as_residual(self, x: Value) -> Value:
        """``x`` in the residual stream's dtype; where operations are chosen, in its own."""
        return x if self.choice.made else self.cast(x, self._residual)

    def add(self, x: Value, y: Value) -> Value:
        name = names.add(names.of(x), names.of(y))
        x, y = self._reads(x, y, result=self._gives(name, x.dtype))
        return self.given(self._typed(self.onnx.Add(x, y), x.dtype), name, x.dtype)

    # Rows without their padding

    def spread(self, x: Value, places: Value) -> Value:
        """Packed tokens [1, T, E] -> [B, S, E], by the token of each place [B, S]."""
        rows = self.onnx.Gather(x, places, axis=1)
        return self._as(self.onnx.Squeeze(rows, self.constant([0], torch.int64)), x)

    def pack(self, x: Value, tokens: Value) -> Value:
        """[B, S, E] -> packed tokens [1, T, E], by each token's place [T]: row * S + column."""
        flat = self._typed(self.onnx.Flatten(x, axis=2), x.dtype)
        rows = self.onnx.Gather(flat, tokens, axis=0)
        return self._as(self.onnx.Unsqueeze(rows, self.constant([0], torch.int64)), x)

    def spelled_out(self, bias: Bias, first_slot: Value) -> Value:
        """A bias as one tensor [B or 1, 1 or H, Q, K], for the slots K that attention reads."""
        if bias not in self._spelled:
            self._spelled[bias] = self._spell(bias, first_slot)
        return self._spelled[bias]

    def _spell(self, bias: Bias, first_slot: Value) -> Value:
        queries = bias.query_positions
        slots = self._visible(bias.slot_positions, queries, first_slot, axis=1)
        if bias.table is None:
            total = self.causal_bias(queries, slots)
        else:
            total = self.position_bias(bias.table, queries, slots, -bias.reach, 1)
        if bias.row_start is not None:  # finite, as a query before its row sees nothing else
            started = self.onnx.Not(self.onnx.Greater(bias.row_start, slots))
            total = self.add(total, self.mask_bias(started))
        if bias.mask is not None:
            total = self.add(total, self._visible(bias.mask, queries, first_slot, axis=3))
        return total

    def _visible(self, x: Value, queries: Value, first_slot: Value, axis: int) -> Value:
        """The part of [.., L] that attention reads: all slots, or where attention appends, those
        up to the last query token's; ``queries`` [Q, 1]."""
        return x

    def attention(
        self, q: Value, k: Value, v: Value, bias: Value | None, heads: int, scale: float = 1.0
    ) -> Value:
        """Attention of [B, Q, H*D] queries over keys and values held as [B, K, H*D], or as
        [B, H, K, D] KV buffers; bias [B or 1, 1 or H, Q, K], None to see all. Products of queries
        and keys are multiplied by ``scale``."""
        if (ranges := self.ranges_of(q, k, v)) is not None:
            return self._integer_attention((q, k, v), ranges, bias, heads, scale)
        name, (q, k, v, bias) = self._factors(q, k, v, bias)
        k, v = (x if _rank(x) == 4 else self._split(x, heads) for x in (k, v))
        q = self._split(self.cast(self._scaled(q, scale), q.dtype), heads)
        return names.give(self._attend(q, k, v, bias), name)

    def _factors(self, q: Value, *others: Value | None) -> tuple[str, list[Any]]:
        """The name of an attention, and what it reads in the dtype that is chosen for it."""
        name = names.attention(names.of(q))
        dtype, factors = self._gives(name, self._compute), [q, *others]
        return name, [x if x is None else self.cast(x, dtype) for x in factors]

    def _attend(
        self, q: Value, k: Value, v: Value, bias: Value | None, scale: float = 1.0
    ) -> Value:
        """[B, H, Q, D] queries over [B, H, K, D]; they are multiplied by ``1 / scale``, and their
        products with keys by ``scale``."""
        if not self.target.attends:
            y = self._products(q, k, v, bias)
        else:
            scaled = q
            if scale != 1.0:
                scaled = self.onnx.Mul(q, self.scalar(1 / scale, q.dtype))
            y = self.onnx.Attention(scaled, k, v, bias, scale=scale)
        return self._joined(y, q.dtype)

    def _joined(self, y: Value, dtype: ir.DataType | None) -> Value:
        """[B, H, Q, D] -> [B, Q, H*D]."""
        return self._typed(self._merged(self.onnx.Transpose(y, perm=[0, 2, 1, 3])), dtype)

    def _products(self, q: Value, k: Value, v: Value, bias: Value | None) -> Value:
        """Attention as stock T5 computes it, its Softmax in float32."""
        scores = self.onnx.MatMul(q, self.onnx.Transpose(k, perm=[0, 1, 3, 2]))
        scores = scores if bias is None else self.onnx.Add(scores, bias)
        scores = self._typed(scores, q.dtype)
        return self.onnx.MatMul(self._softmax(scores, q.dtype), v)

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
        """Write k and v [B, Q, H*D] into their slots, then attend, with products of queries and
        keys times ``scale``; also gives the KV buffers. ``heads`` are q's."""
        groups = slots.groups
        heads = heads if groups is None else groups.count
        rows = [self._split(self.cast(x, self._compute), heads) for x in (k, v)]
        key = self.onnx.TensorScatter(slots.key, rows[0], slots.first_slot, axis=-2)
        value = self.onnx.TensorScatter(slots.value, rows[1], slots.first_slot, axis=-2)
        key, value = (self._typed(x, self._compute) for x in (key, value))
        name, (q, keys, values) = self._factors(q, key, value)
        q = self._folded(self.cast(self._scaled(q, scale), q.dtype), groups)
        q = self._split(q, heads)
        spelled = self.cast(self._folded_bias(bias, slots.first_slot, groups), q.dtype)
        # TensorRT would copy the whole key buffer at every step if the scale were 1
        y = self._attend(q, keys, values, spelled, _CACHED_SCALE)
        return names.give(self._unfolded(y, groups), name), key, value

    def as_kv(self, x: Value, heads: int, head_size: int) -> Value:
        """[B, K, H*D] -> the layout of a KV buffer."""
        return self._split(x, heads, head_size)

    def _split(self, x: Value, heads: int, head_size: int = -1) -> Value:
        """[B, K, H*D] -> [B, H, K, D]."""
        split = self.onnx.Reshape(x, self.constant([0, 0, heads, head_size], torch.int64))
        return self._typed(self.onnx.Transpose(split, perm=[0, 2, 1, 3]), x.dtype)


def _rank(x: Value) -> int | None:
    return None if x.shape is None else len(x.shape)
