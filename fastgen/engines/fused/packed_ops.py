"""The vocabulary of ``ops`` over packed tokens: what an encoder launches, recorded.

A family's ``encode`` runs through ``PackedOps`` unchanged. It is lazy: embeddings, products and
activations stay descriptions until something needs their numbers. Rows are tokens without padding,
[T, E] in the compute dtype; a residual stream that is not normed after each addition is not served.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from fastgen.engines import NotFused
from fastgen.engines.fused.packed_kernels import Activate, Embed, NormRows, Prefetch
from fastgen.engines.fused.packed_values import MAX_TERMS, Buffer, Norm, Size, Term
from fastgen.engines.fused.products import ACTIVATIONS
from fastgen.engines.fused.recorder import Builder, narrow_results
from fastgen.ops import names
from fastgen.target import Target

MAX_WIDTH = 8192  # of a row, that a block of the kernels holds
MAX_HEAD_SIZE = 256  # of torch's attention kernels


class Recorded(Protocol):
    """One launch, or several that do not depend on each other."""

    @property
    def reads(self) -> Sequence[Buffer]: ...

    @property
    def writes(self) -> Sequence[Buffer]: ...

    def __call__(self, size: Size) -> None:
        """Queue it on torch's current stream."""


# Values


@dataclass(frozen=True, eq=False)
class Ids:
    """One number a token: a call's, or (None) the token's column in its row."""

    name: str | None


@dataclass(frozen=True, eq=False)
class Embedded:
    """A sum of embeddings."""

    terms: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Product:
    """``scale * x @ matrix + bias``, activated if there is an activation."""

    x: Buffer
    matrix: torch.Tensor
    bias: torch.Tensor | None
    scale: float = 1.0
    activation: str | None = None
    """One of cuBLAS: RELU, or GELU_TANH."""
    name: str = ""
    """Of the operation (see ``ops/names.py``)."""

    def into(self, buffer: Buffer, size: Size) -> None:
        x, y = self.x.rows(size.tokens), buffer.rows(size.tokens)
        if self.activation is not None and self.bias is not None:
            gelu = self.activation != "RELU"
            torch._addmm_activation(
                self.bias, x, self.matrix, alpha=self.scale, use_gelu=gelu, out=y
            )
        elif self.bias is not None:
            torch.addmm(self.bias, x, self.matrix, alpha=self.scale, out=y)
        else:
            torch.addmm(y, x, self.matrix, beta=0.0, alpha=self.scale, out=y)


@dataclass(frozen=True, eq=False)
class Activated:
    product: Product
    kind: str


class Visible:
    """The bias that hides what a call's mask hides, and nothing else."""


class Total:
    """A sum of which nothing but its norm was computed."""


# Launches that are not kernels of our own


class Products:
    """Products by cuBLAS, each with its bias; they do not depend on each other."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products
        self.reads = [product.x for product in products]
        self.writes = [Buffer(product.matrix.shape[1]) for product in products]
        self.ahead: Prefetch | None = None
        """Fetches the weights of the products that follow, if there is a stream for it."""

    def __call__(self, size: Size) -> None:
        if size.side:
            self._side_by_side(size)
            return
        for product, y in zip(self.products, self.writes, strict=True):
            product.into(y, size)

    def _side_by_side(self, size: Size) -> None:
        """On streams of their own: few rows leave most of a GPU's processors idle."""
        began, ended = torch.cuda.Event(), []
        began.record()
        pairs = [*zip(self.products, self.writes, strict=True)]
        if size.fetching is not None and self.ahead is not None:
            size.fetching.wait_event(began)
            with torch.cuda.stream(size.fetching):
                self.ahead()
        for stream, (product, y) in zip(size.side, pairs[1:], strict=False):
            stream.wait_event(began)
            with torch.cuda.stream(stream):
                product.into(y, size)
                ended.append(torch.cuda.Event())
                ended[-1].record()
        for product, y in [pairs[0], *pairs[1 + len(size.side) :]]:
            product.into(y, size)
        for event in ended:
            event.wait()


class Attention:
    """Attention of each row's tokens to its visible ones, without a padded tensor of scores."""

    def __init__(self, q: Buffer, k: Buffer, v: Buffer, heads: int, scale: float) -> None:
        self.reads, self.writes = [q, k, v], [Buffer(q.width, made=True)]
        self.heads, self.scale = heads, scale

    def __call__(self, size: Size) -> None:
        rows, heads = size.tokens, self.heads
        q, k, v = (x.rows(rows).view(rows, heads, x.width // heads) for x in self.reads)
        if size.even:
            y = self._even(size, q, k, v)
        elif q.device.type != "cuda":
            y = self.reference(size, q, k, v)
        elif q.dtype == torch.float32:
            y = self._efficient(size, q, k, v)
        else:
            y = self._flash(size, q, k, v)
        self.writes[0].tensor = y.reshape(rows, self.writes[0].width)

    def _even(self, size: Size, *qkv: torch.Tensor) -> torch.Tensor:
        """By the fastest of torch's kernels, which know no rows of different lengths."""
        q, k, v = (x.unflatten(0, (-1, size.longest)).transpose(1, 2) for x in qkv)
        y: torch.Tensor = scaled_dot_product_attention(q, k, v, scale=self.scale)
        return y.transpose(1, 2)

    def _flash(self, size: Size, *qkv: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aten._flash_attention_forward(
            *qkv,
            *(size.starts, size.starts, size.longest, size.longest),
            *(0.0, False, False),  # no dropout, no causal mask, nothing to debug
            scale=self.scale,
            seqused_k=size.keys,
        )[0]
        return y

    def _efficient(self, size: Size, *qkv: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aten._efficient_attention_forward(
            *(x[None] for x in qkv),
            *(None, size.starts, size.starts, size.longest, size.longest),
            *(0.0, 0),  # no dropout, no causal mask
            scale=self.scale,
            seqlen_k=size.keys,
        )[0]
        return y[0]

    def reference(
        self, size: Size, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """What both compute, row by row."""
        y = torch.zeros_like(q)
        starts = size.starts.tolist()
        for start, stop, keys in zip(starts[:-1], starts[1:], size.keys.tolist(), strict=True):
            of_row = q[start:stop], k[start : start + keys], v[start : start + keys]
            own, key, value = (x.transpose(0, 1) for x in of_row)
            attended = scaled_dot_product_attention(own, key, value, scale=self.scale)
            y[start:stop] = attended.transpose(0, 1)
        return y


class PackedOps:
    """Records the launches of an encoder; the methods are those of ``ops.Ops``."""

    def __init__(self, target: Target, parameters: Mapping[str, torch.Tensor]) -> None:
        self.builder = Builder()
        self.embed: Embed | None = None
        """What reads a call's ids; all others read buffers."""
        self.launches: list[Recorded] = []
        self._parameters = parameters
        self._dtype = getattr(torch, target.dtype)
        self._rounds = narrow_results(target)

    def __getattr__(self, name: str) -> Any:
        raise NotFused(f"operation {name!r} over packed rows")

    # Values

    def _weight(self, value: Any, width: int | None = None) -> torch.Tensor:
        weight = self._parameters[value.name]
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

    def rows(self, x: Any) -> Buffer:
        """The numbers of a value."""
        if isinstance(x, Buffer):
            return x
        if isinstance(x, Product):
            return self._record(Products([x]))[0]
        if isinstance(x, Activated):
            return self._activated(x.product, x.kind)
        raise NotFused(f"{type(x).__name__.lower()} values as rows")

    def _activated(self, product: Product, kind: str) -> Buffer:
        """A product's activation: cuBLAS's, on the sums as they are before they are rounded, where
        that comes closer to float32 than what stock computes.

        In 16 bits that is so for its tanh in place of erf: of normal numbers of deviations 0.3 to 3
        it is off by 1.7e-3 in bfloat16 and 2.3e-4 to 2.9e-4 in float16, where erf of the rounded
        sums is off by 1.9e-3 to 2.7e-3 and 2.4e-4 to 3.3e-4.
        """
        narrow = self._dtype != torch.float32 and kind in ("GELU_TANH", "GELU_ERF")
        if product.bias is not None and (narrow or kind == "RELU"):
            activation = "GELU_TANH" if narrow else kind
            return self._record(Products([replace(product, activation=activation)]))[0]
        (y,) = self._record(Products([product]))
        self._record(Activate(y, kind))
        return y

    # The vocabulary

    def embedding(self, ids: Ids, weight: Any, scale: float = 1.0, offset: int = 0) -> Embedded:
        return Embedded((Term(ids.name, self._weight(weight), scale, offset),))

    def add(self, x: Embedded, y: Embedded) -> Embedded:
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
        else:
            self._record(NormRows(self._of_width(x, y.width), None, norm, y))
        return y

    def add_layer_norm(
        self, residual: Any, x: Any, weight: Any, bias: Any, eps: float
    ) -> tuple[Total, Buffer]:
        norm = self._norm(weight, bias, eps)
        y, before = Buffer(len(norm.weight)), self._of_width(residual, len(norm.weight))
        self._record(NormRows(self._of_width(x, y.width), before, norm, y))
        return Total(), y

    def _norm(self, weight: Any, bias: Any, eps: float) -> Norm:
        self._rounds(names.of_parameter(weight))
        norm = Norm(self._weight(weight), self._weight(bias), eps)
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
    ) -> Product:
        matrix = self._weight(weight) if transposed else self._weight(weight).T
        addend = None if bias is None else self._weight(bias, matrix.shape[1])
        name = names.of_parameter(weight)
        self._rounds(name)
        return Product(self.rows(x), matrix, addend, scale, name=name)

    def activation(self, x: Product, name: str) -> Activated:
        if name not in ACTIVATIONS or not isinstance(x, Product):
            raise NotFused(f"activation {name!r}: one of {sorted(ACTIVATIONS)}, of a product")
        self._rounds(names.activation(x.name))
        return Activated(x, ACTIVATIONS[name])

    def mask_bias(self, attention_mask: Any) -> Visible:
        return Visible()

    def for_queries(self, mask: Visible, query_positions: Any) -> Visible:
        return mask

    def spread(self, x: Any, places: Any) -> Any:
        return x

    def pack(self, x: Any, tokens: Any) -> Any:
        return x

    def attention(
        self, q: Any, k: Any, v: Any, bias: Visible | None, heads: int, scale: float = 1.0
    ) -> Buffer:
        if not (bias is None or isinstance(bias, Visible)):
            raise NotFused("attention with a bias beside the mask")
        of_one = all(isinstance(x, Product) for x in (q, k, v))
        if not of_one or not (q.matrix.shape == k.matrix.shape == v.matrix.shape):
            raise NotFused("attention of other values than three products of a size")
        head_size, step = q.matrix.shape[1] // heads, 4 if self._dtype == torch.float32 else 8
        if head_size % step or head_size > MAX_HEAD_SIZE:
            raise NotFused(f"head size {head_size}: multiples of {step} up to {MAX_HEAD_SIZE}")
        self._rounds(names.attention(q.name))
        query, key, value = self._record(Products([q, k, v]))
        return self._record(Attention(query, key, value, heads, scale))[0]
