"""Attention over packed tokens: torch's, and with a bias by relative position our own."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from fastgen.engines import NotFused
from fastgen.engines.fused.packed_kernels import Kernel
from fastgen.engines.fused.packed_values import Buffer, Size

MAX_HEAD_SIZE = 256  # of torch's attention kernels
TILE = 64  # queries of a block of our own
MAX_BIASED_HEAD_SIZE, MAX_SPAN = 128, 1025  # what a block's registers and shared memory hold


def by_row(size: Size) -> Iterator[tuple[slice, slice]]:
    """Of each row, its tokens, and those that they see."""
    starts = size.starts.tolist()
    for start, stop, keys in zip(starts[:-1], starts[1:], size.keys.tolist(), strict=True):
        yield slice(start, stop), slice(start, start + keys)


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
        for own, seen in by_row(size):
            query, key, value = (x.transpose(0, 1) for x in (q[own], k[seen], v[seen]))
            attended = scaled_dot_product_attention(query, key, value, scale=self.scale)
            y[own] = attended.transpose(0, 1)
        return y


@dataclass(frozen=True, eq=False)
class Table:
    """A bias by relative position: ``weight`` [buckets, heads], by the bucket of each distance."""

    weight: torch.Tensor
    buckets: torch.Tensor
    """int32 [2 * reach + 1]: of the distances key minus query from -reach to reach; those beyond
    are as these."""

    @property
    def reach(self) -> int:
        return len(self.buckets) // 2


class RowsAttentionArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "y", "bias", "buckets")),
        *((name, ctypes.c_void_p) for name in ("starts", "keys", "columns")),
        *(("heads", ctypes.c_int), ("tiles", ctypes.c_int), ("scale", ctypes.c_float)),
    ]


class BiasedAttention(Kernel):
    """As ``Attention``, with a bias by the distance of tokens' columns."""

    source = "encoder_attention.cu"
    threads = 128

    def __init__(
        self, q: Buffer, k: Buffer, v: Buffer, heads: int, scale: float, table: Table
    ) -> None:
        super().__init__()
        self.y = Buffer(q.width)
        self.reads, self.writes = [q, k, v], [self.y]
        self.heads, self.scale, self.table = heads, scale, table
        self.head_size = q.width // heads
        self.arguments = RowsAttentionArgs(
            bias=table.weight.data_ptr(),
            buckets=table.buckets.data_ptr(),
            heads=heads,
            scale=scale,
        )

    @staticmethod
    def check(table: Table, heads: int, head_size: int) -> None:
        """Raise NotFused where no kernel serves it; on a CPU torch does."""
        if table.weight.shape[1] != heads:
            raise NotFused(f"a position table of {table.weight.shape[1]} heads for {heads}")
        if table.weight.device.type == "cpu":
            return
        if table.weight.dtype == torch.float32:
            raise NotFused("attention with a position table in float32: 16 bits are served")
        if head_size % 16 or head_size > MAX_BIASED_HEAD_SIZE or len(table.buckets) > MAX_SPAN:
            most = f"multiples of 16 up to {MAX_BIASED_HEAD_SIZE}, tables up to {MAX_SPAN}"
            raise NotFused(f"head size {head_size}, {len(table.buckets)} distances: {most}")

    @property
    def body(self) -> str:
        return f"attend_rows<{self.head_size}, {len(self.table.buckets)}>"

    def __call__(self, size: Size) -> None:
        if not self.on_gpu:
            self.reference(size)
            return
        assert size.columns is not None
        args, tiles = self.arguments, -(-size.longest // TILE)
        args.q, args.k, args.v = (x.tensor.data_ptr() for x in self.reads)
        args.y, args.starts = self.y.tensor.data_ptr(), size.starts.data_ptr()
        args.keys, args.columns = size.keys.data_ptr(), size.columns.data_ptr()
        args.tiles = tiles
        self.launch(tiles * self.heads * len(size.keys))

    def reference(self, size: Size) -> None:
        assert size.columns is not None
        q, k, v = (x.tensor.unflatten(1, (self.heads, -1)).float() for x in self.reads)
        reach = self.table.reach
        for own, seen in by_row(size):
            distances = size.columns[None, seen] - size.columns[own, None]
            buckets = self.table.buckets[distances.clamp(-reach, reach) + reach]
            bias = self.table.weight.float()[buckets].permute(2, 0, 1)
            query, key, value = (x.transpose(0, 1) for x in (q[own], k[seen], v[seen]))
            attended = scaled_dot_product_attention(query, key, value, bias, scale=self.scale)
            y = attended.transpose(0, 1).flatten(1)
            self.y.tensor[own] = y.to(self.y.tensor.dtype)
