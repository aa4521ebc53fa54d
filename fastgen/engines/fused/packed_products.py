"""Products of packed rows by cuBLAS, some of them side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from fastgen.engines.fused.packed_kernels import Prefetch
from fastgen.engines.fused.packed_values import Buffer, Rounded, Size
from fastgen.engines.fused.values import Matrix

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
    made_of: Matrix | None = None
    """Weights of fewer bits that the matrix is made of, in scratch."""
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
        pairs = zip(self.products, self.writes, strict=True)
        runs = [partial(product.into, y, size) for product, y in pairs]
        _queue(self.products, runs, size, self.ahead)


class Together:
    """Launches of a product each that do not depend on each other."""

    def __init__(self, products: Sequence[Product], launches: Sequence[Recorded]) -> None:
        self._products, self.launches = products, launches
        self.reads = [buffer for each in launches for buffer in each.reads]
        self.writes = [buffer for each in launches for buffer in each.writes]

    def __call__(self, size: Size) -> None:
        _queue(self._products, [partial(launch, size) for launch in self.launches], size)


def _queue(
    products: Sequence[Product],
    runs: Sequence[Callable[[], None]],
    size: Size,
    ahead: Callable[[], None] | None = None,
) -> None:
    """Queue what computes each product: side by side, if there are streams for that and some
    product alone leaves processors idle. For ``ahead`` see ``_side_by_side``."""
    if size.side and not _fill(products, size):
        _side_by_side(runs, size, ahead)
        return
    for run in runs:
        run()


def _fill(products: Sequence[Product], size: Size) -> bool:
    """Whether each of them fills a GPU by itself: side by side they would only wait."""
    least = min(product.matrix.numel() for product in products)
    return size.tokens > FILLING_TOKENS and least >= FILLING


def _side_by_side(
    runs: Sequence[Callable[[], None]], size: Size, ahead: Callable[[], None] | None
) -> None:
    """Queue work on streams of its own: few rows leave most of a GPU's processors idle.

    Args:
        ahead: fetches weights, if there is a stream for it.
    """
    began, ended = torch.cuda.Event(), []
    began.record()
    if size.fetching is not None and ahead is not None:
        size.fetching.wait_event(began)
        with torch.cuda.stream(size.fetching):
            ahead()
    for stream, run in zip(size.side, runs[1:], strict=False):
        stream.wait_event(began)
        with torch.cuda.stream(stream):
            run()
            ended.append(torch.cuda.Event())
            ended[-1].record()
    for run in [runs[0], *runs[1 + len(size.side) :]]:
        run()
    for event in ended:
        event.wait()
