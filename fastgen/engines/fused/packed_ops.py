"""The vocabulary of ``ops`` over packed tokens: what an encoder launches, recorded.

A family's ``encode`` runs through ``PackedOps`` unchanged. It is lazy: embeddings, products and
activations stay descriptions until something needs their numbers. Rows are tokens without padding,
[T, E] in the compute dtype. A residual stream is what was normed (layer norms), or is kept apart in
float32, and products are added to it as they are summed (root-mean-square norms).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastgen.blockwise import Format
from fastgen.engines import NotFused
from fastgen.engines.fused.packed_attention import (
    MAX_HEAD_SIZE,
    Attention,
    BiasedAttention,
    Table,
)
from fastgen.engines.fused.packed_described import (
    Activated,
    Embedded,
    Ids,
    ResidualStream,
    Total,
    Visible,
)
from fastgen.engines.fused.packed_integers import Round, are_integers, integer_product
from fastgen.engines.fused.packed_kernels import (
    Activate,
    Embed,
    LeavesRows,
    NormRows,
    NormStream,
)
from fastgen.engines.fused.packed_products import Product, Products, Recorded, Together
from fastgen.engines.fused.packed_values import MAX_TERMS, VECTOR, Buffer, Norm, Rounded, Term
from fastgen.engines.fused.packed_weights import KINDS, Placing, Scratch, narrow_matrix
from fastgen.engines.fused.products import ACTIVATIONS
from fastgen.engines.fused.recorder import narrow_results
from fastgen.ops import names
from fastgen.target import Target

MAX_WIDTH = 8192  # of a row, that a block of the kernels holds


class PackedOps:
    """Records the launches of an encoder; the methods are those of ``ops.Ops``."""

    def __init__(
        self, target: Target, parameters: Mapping[str, torch.Tensor], scratch: Scratch | None = None
    ) -> None:
        """``scratch`` is for weights of fewer bits; without it, it has no memory."""
        self.builder = names.Builder()
        self.embed: Embed | None = None
        """What reads a call's ids; all others read buffers."""
        self.launches: list[Recorded] = []
        self.reads_columns = False
        """Whether some launch asks for tokens' columns."""
        self.read: dict[str, torch.Tensor] = {}
        """Parameters that launches read as they are."""
        self._parameters, self._target = parameters, target
        self._leaving: dict[Buffer, LeavesRows] = {}
        """What leaves rows that somebody may read as integers."""
        self._rounded: dict[tuple[Buffer, float | None, bool], Rounded] = {}
        self._dtype = getattr(torch, target.dtype)
        self._placing = Placing(scratch or Scratch(self._dtype), self.launches.append)
        self._rounds = narrow_results(target)
        self._zeros: dict[int, torch.Tensor] = {}
        self._streams: dict[Embedded, ResidualStream] = {}
        self._additions = 0

    def __getattr__(self, name: str) -> Any:
        raise NotFused(f"operation {name!r} over packed rows")

    # Values

    def _weight(self, value: Any, width: int | None = None) -> torch.Tensor:
        weight = self.read[value.name] = self._parameters[value.name].detach()
        if weight.dtype != self._dtype:
            raise NotFused(f"{value.name} in {weight.dtype}, activations in {self._dtype}")
        if not weight.is_contiguous():
            raise NotFused(f"{value.name} is not contiguous")
        if width is not None and weight.shape[-1] != width:
            raise NotFused(f"{value.name} {tuple(weight.shape)} for rows of {width}")
        return weight

    def _record(self, launch: Recorded) -> list[Buffer]:
        self.launches.append(launch)
        return [*launch.writes]

    def _products(self, *products: Product) -> list[Buffer]:
        """The results of products that do not depend on each other."""
        if all(product.steps is None for product in products):
            placed = self._placing.in_turn(products)
            return [y for some in placed for y in self._record(Products(some))]
        launches = [
            Products([each]) if each.steps is None else integer_product(each, self._dtype)
            for each in self._placing.placed(products)
        ]
        self._record(launches[0] if len(launches) == 1 else Together(products, launches))
        return [launch.writes[0] for launch in launches]

    def _of_integers(
        self, product: Product, gate: Product | None = None, leaves: Rounded | None = None
    ) -> Buffer:
        """The result of a product of integers (see ``IntegerProduct``)."""
        if self._dtype != torch.float32 and product.activation == "GELU_ERF":
            product = replace(product, activation="GELU_TANH")  # see ``_activated``
        return self._record(integer_product(product, self._dtype, gate, leaves))[0]

    def rows(self, x: Any) -> Buffer:
        """The numbers of a value."""
        if isinstance(x, Buffer):
            x.plain = True
            return x
        if isinstance(x, Product):
            self._rounds(x.name)
            return self._products(x)[0]
        if isinstance(x, Activated):
            return self._activated(x.product, x.kind, x.gate)
        raise NotFused(f"{type(x).__name__.lower()} values as rows")

    def _activated(self, product: Product, kind: str, gate: Product | None) -> Buffer:
        """A product's activation: cuBLAS's, on the sums as they are before they are rounded, where
        that comes closer to float32 than what stock computes.

        In 16 bits that is so for its tanh in place of erf: of normal numbers of deviations 0.3 to 3
        it is off by 1.7e-3 in bfloat16 and 2.3e-4 to 2.9e-4 in float16, where erf of the rounded
        sums is off by 1.9e-3 to 2.7e-3 and 2.4e-4 to 3.3e-4.
        """
        if are_integers(product, gate):
            return self._of_integers(replace(product, activation=kind), gate)
        if gate is not None:
            y, factor = self._products(product, gate)
            self._record(Activate(y, kind, factor))
            return y
        narrow = self._dtype != torch.float32 and kind in ("GELU_TANH", "GELU_ERF")
        if kind == "RELU" and product.bias is None and self._dtype != torch.float16:
            # in float16 our own kernel keeps it finite, as T5 must
            product = replace(product, bias=self._no_bias(product.matrix))
        if product.bias is not None and (narrow or kind == "RELU"):
            activation = "GELU_TANH" if narrow else kind
            return self._products(replace(product, activation=activation))[0]
        (y,) = self._products(product)
        self._record(Activate(y, kind))
        return y

    def _no_bias(self, matrix: torch.Tensor) -> torch.Tensor:
        """Zeros, for the cuBLAS products that take a bias."""
        width = matrix.shape[1]
        if width not in self._zeros:
            self._zeros[width] = matrix.new_zeros(width)
        return self._zeros[width]

    # The vocabulary

    def embedding(self, ids: Ids, weight: Any, scale: float = 1.0, offset: int = 0) -> Embedded:
        return Embedded((Term(ids.name, self._weight(weight), scale, offset),))

    def add(self, x: Any, y: Any) -> Any:
        if isinstance(x, Table) and isinstance(y, Visible):
            return x  # attention hides what the mask hides anyway
        if not (isinstance(x, Embedded) and isinstance(y, Embedded)):
            raise NotFused("sums of other values than embeddings")
        if len(terms := x.terms + y.terms) > MAX_TERMS:
            raise NotFused(f"{len(terms)} embeddings in one sum: {MAX_TERMS} at most")
        return Embedded(terms)

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float) -> Buffer:
        norm = self._norm(weight, bias, eps)
        y = Buffer(len(norm.weight))
        if isinstance(x, Embedded):
            if self.embed is not None or any(t.table.shape[1] != y.width for t in x.terms):
                raise NotFused("a second norm of embeddings, or one of another width")
            self.embed = Embed(x.terms, norm, y)
            return self._left_by(self.embed)
        return self._left_by(NormRows(self._of_width(x, y.width), None, norm, y))

    def add_layer_norm(
        self, residual: Any, x: Any, weight: Any, bias: Any, eps: float
    ) -> tuple[Total, Buffer]:
        norm = self._norm(weight, bias, eps)
        y, before = Buffer(len(norm.weight)), self._of_width(residual, len(norm.weight))
        return Total(), self._left_by(NormRows(self._of_width(x, y.width), before, norm, y))

    def _left_by(self, kernel: Embed | NormRows | NormStream) -> Buffer:
        """The rows that a norm leaves: in what form, those who read them say."""
        if not isinstance(kernel, Embed):
            self._record(kernel)
        kernel.y.plain = False
        self._leaving[kernel.y] = kernel
        return kernel.y

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Buffer:
        norm = self._norm(weight, None, eps)
        y = Buffer(len(norm.weight))
        if isinstance(x, Embedded) and x not in self._streams:
            if self.embed is not None or any(t.table.shape[1] != y.width for t in x.terms):
                raise NotFused("a second norm of embeddings, or one of another width")
            stream = self._streams[x] = ResidualStream(Buffer(y.width, dtype=torch.float32))
            self.embed = Embed(x.terms, norm, y, stream.buffer)
            return self._left_by(self.embed)
        stream = self._stream(x)
        if stream.buffer.width != y.width:
            raise NotFused(f"a norm of {y.width} columns of a stream of {stream.buffer.width}")
        return self._left_by(NormStream(stream.buffer, norm, y))

    def add_rms_norm(
        self, residual: Any, x: Any, weight: Any, eps: float
    ) -> tuple[ResidualStream, Buffer]:
        stream = self._stream(residual)
        if not isinstance(x, Product) or x.bias is not None:
            raise NotFused("what is added to a residual stream is no product, or has a bias")
        if x.matrix.shape[1] != stream.buffer.width:
            raise NotFused(f"{x.matrix.shape[1]} columns onto a stream of {stream.buffer.width}")
        x = replace(x, onto=stream.buffer)
        self._products(x)
        if isinstance(x.x, Rounded) and x.x.rest is not None:
            self._products(replace(x, x=x.x.rest))
        self._additions += 1
        total = ResidualStream(stream.buffer, self._additions)
        return total, self.rms_norm(total, weight, eps)

    def _stream(self, x: Any) -> ResidualStream:
        """A residual stream that nothing was added to since."""
        stream = self._streams.get(x) if isinstance(x, Embedded) else x
        if not isinstance(stream, ResidualStream) or stream.additions != self._additions:
            raise NotFused(f"{type(x).__name__.lower()} values as a residual stream")
        return stream

    def _norm(self, weight: Any, bias: Any, eps: float) -> Norm:
        self._rounds(names.of_parameter(weight))
        norm = Norm(self._weight(weight), None if bias is None else self._weight(bias), eps)
        if len(norm.weight) > MAX_WIDTH:
            raise NotFused(f"a norm of rows of {len(norm.weight)}: {MAX_WIDTH} at most")
        return norm

    def _of_width(self, x: Any, width: int) -> Buffer:
        rows = self.rows(x)
        if rows.width != width or rows.made:
            raise NotFused(f"rows of {rows.width} where {width} are normed, or of attention")
        return rows

    def as_residual(self, x: Any) -> Any:
        return x

    def linear(
        self,
        x: Any,
        weight: Any,
        bias: Any = None,
        scale: float = 1.0,
        transposed: bool = False,
        split: bool = False,
    ) -> Product:
        name, known = names.of_parameter(weight), self._target.calibration
        self._rounds(names.product(name))
        found = None if known is None else known.inputs.get(name)
        outputs, inputs = self._parameters[weight.name].shape[:: -1 if transposed else 1]
        addend = None if bias is None else self._weight(bias, outputs)
        if found is None and self._target.weights in KINDS:
            made_of = narrow_matrix(self._parameters, weight.name, self._target, transposed)
            # without memory, until it is placed
            matrix = made_of.values.new_empty(1, dtype=self._dtype).expand(made_of.sizes)
            return Product(self.rows(x), matrix, addend, scale, made_of=made_of, name=name)
        if found is None and self._target.weights != "int8":
            matrix = self._weight(weight) if transposed else self._weight(weight).T
            return Product(self.rows(x), matrix, addend, scale, name=name)
        if scale != 1.0 or inputs % 16 or outputs % 16:
            raise NotFused(f"{name}: scaled, or of {inputs} x {outputs}: 16 must divide both")
        made = Format("int8", 0, transposed).names(weight.name)
        values, steps = (self._parameters[n] for n in made)
        step = None if found is None else found.symmetric()
        of = self._as_integers(x, step, split and step is None, values.device)
        return Product(of, values.T, addend, steps=steps, name=name)

    def wide_linear(self, x: Any, weight: Any) -> Product:
        """Its sums stay float32 on a residual stream. Gates and activations have few large numbers
        among many small ones, which 127 steps do not hold: as integers they are split in two."""
        return self.linear(x, weight, split=isinstance(x, Activated))

    def _as_integers(
        self, x: Any, step: float | None, split: bool, device: torch.device
    ) -> Rounded:
        """The numbers of a value as 8-bit integers, rounded by what leaves them where that can."""
        if isinstance(x, Activated) and step is not None and are_integers(x.product, x.gate):
            rounded = Rounded.on(device, x.product.matrix.shape[1], step)
            self._of_integers(replace(x.product, activation=x.kind), x.gate, rounded)
            return rounded
        rows = x if isinstance(x, Buffer) else self.rows(x)
        if (key := (rows, step, split)) in self._rounded:
            return self._rounded[key]
        rounded = self._rounded[key] = Rounded.on(device, rows.width, step, split)
        kernel = self._leaving.get(rows)
        if kernel is not None and kernel.vector == VECTOR and rows.rounded is None:
            rows.rounded = rounded
        else:
            self._record(Round(self.rows(rows), rounded))
        return rounded

    def multiply(self, x: Activated, y: Product) -> Activated:
        pair = isinstance(x, Activated) and isinstance(y, Product) and x.gate is None
        if not pair or x.product.matrix.shape != y.matrix.shape:
            raise NotFused("a gate that is not a second product of the activated one's size")
        self._rounds(y.name, names.multiply(x.product.name))
        return replace(x, gate=y)

    def activation(self, x: Product, name: str) -> Activated:
        if name not in ACTIVATIONS or not isinstance(x, Product):
            raise NotFused(f"activation {name!r}: one of {sorted(ACTIVATIONS)}, of a product")
        self._rounds(x.name, names.activation(x.name))
        return Activated(x, ACTIVATIONS[name])

    def position_table(self, weight: Any, buckets: Sequence[int], future: int | None) -> Table:
        if future is not None or len(buckets) % 2 == 0:
            raise NotFused("a position table of one side")
        reach, table = len(buckets) // 2, self._weight(weight)
        ordered = [*buckets[reach + 1 :], *buckets[: reach + 1]]
        return Table(table, torch.tensor(ordered, dtype=torch.int32, device=table.device))

    def position_bias(
        self, table: Table, query_positions: Any, key_positions: Ids, low: int, high: int
    ) -> Table:
        if not isinstance(key_positions, Ids) or key_positions.name is not None:
            raise NotFused("a position bias of other tokens than those of a row")
        if (low, high) != (-table.reach, table.reach):
            raise NotFused(f"distances from {low} to {high} of a table of {table.reach}")
        return table

    def mask_bias(self, attention_mask: Any) -> Visible:
        return Visible()

    def for_queries(self, mask: Visible, query_positions: Any) -> Visible:
        return mask

    def spread(self, x: Any, places: Any) -> Any:
        return x

    def pack(self, x: Any, tokens: Any) -> Any:
        return x

    def attention(
        self, q: Any, k: Any, v: Any, bias: Any, heads: int, scale: float = 1.0
    ) -> Buffer:
        if not (bias is None or isinstance(bias, Visible | Table)):
            raise NotFused("attention with a bias beside the mask and a position table")
        of_one = all(isinstance(x, Product) for x in (q, k, v))
        if not of_one or not (q.matrix.shape == k.matrix.shape == v.matrix.shape):
            raise NotFused("attention of other values than three products of a size")
        self._rounds(q.name, k.name, v.name, names.attention(q.name))
        head_size, step = q.matrix.shape[1] // heads, 4 if self._dtype == torch.float32 else 8
        if isinstance(bias, Table):
            BiasedAttention.check(bias, heads, head_size)
            self.reads_columns = True
            query, key, value = self._products(q, k, v)
            biased = BiasedAttention(query, key, value, heads, scale, bias)
            return self._record(biased)[0]
        if head_size % step or head_size > MAX_HEAD_SIZE:
            raise NotFused(f"head size {head_size}: multiples of {step} up to {MAX_HEAD_SIZE}")
        query, key, value = self._products(q, k, v)
        return self._record(Attention(query, key, value, heads, scale))[0]
