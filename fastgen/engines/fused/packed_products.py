"""Products of packed rows by cuBLAS, some of them side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastgen.engines.fused.packed_kernels import Prefetch
from fastgen.engines.fused.packed_values import Buffer, Rounded, Size

FILLING, FILLING_TOKENS = 2**24, 256  # elements of a matrix, and tokens


class Recorded(Protocol):
    """One launch, or several that do not depend on each other."""

    @property
    def reads(self) -> Sequence[Buffer]: ...

    @property
    def writes(self) -> Sequence[Buffer]: ...

    def __call__(self, size: Size) -> None:
        """Queue it on torch's current stream."""


@dataclass(frozen=True, eq=False)
class Product:
    """``scale * x @ matrix + bias``, activated if there is an activation."""

    x: Buffer | Rounded
    matrix: torch.Tensor
    """[in, out]; of 8-bit integers, if x is."""
    bias: torch.Tensor | None
    scale: float = 1.0
    activation: str | None = None
    """One of cuBLAS: RELU, or GELU_TANH; of integers any."""
    onto: Buffer | None = None
    """A residual stream that it is added to."""
    steps: torch.Tensor | None = None
    """float32 [out, 1], of a matrix of integers."""
    name: str = ""
    """Of the operation (see ``ops/names.py``)."""

    def into(self, buffer: Buffer, size: Size) -> None:
        assert isinstance(self.x, Buffer)
        x, y = self.x.rows(size.tokens), buffer.rows(size.tokens)
        if self.onto is not None:
            if x.dtype == y.dtype:
                torch.addmm(y, x, self.matrix, alpha=self.scale, out=y)
            else:
                addmm = torch.ops.aten.addmm.dtype_out
                addmm(y, x, self.matrix, y.dtype, beta=1.0, alpha=self.scale, out=y)
        elif self.activation is not None and self.bias is not None:
            gelu = self.activation != "RELU"
            torch._addmm_activation(
                self.bias, x, self.matrix, alpha=self.scale, use_gelu=gelu, out=y
            )
        elif self.bias is not None:
            torch.addmm(self.bias, x, self.matrix, alpha=self.scale, out=y)
        else:
            torch.addmm(y, x, self.matrix, beta=0.0, alpha=self.scale, out=y)


class Products:
    """Products of full weights by cuBLAS, each with its bias; they do not depend on each other."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products
        self.reads = [product.x for product in products if isinstance(product.x, Buffer)]
        self.writes = [product.onto or Buffer(product.matrix.shape[1]) for product in products]
        self.ahead: Prefetch | None = None
        """Fetches the weights of the products that follow, if there is a stream for it."""

    def __call__(self, size: Size) -> None:
        if size.side and not self._fill(size):
            self._side_by_side(size)
            return
        for product, y in zip(self.products, self.writes, strict=True):
            product.into(y, size)

    def _fill(self, size: Size) -> bool:
        """Whether each of them fills a GPU by itself: side by side they would only wait."""
        least = min(product.matrix.numel() for product in self.products)
        return size.tokens > FILLING_TOKENS and least >= FILLING

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
