"""Attention of many rows, or over long KV buffers: which kernel serves it, in which sizes (see
attention_wide.cu)."""

from dataclasses import dataclass, replace

import torch

SLOTS = 16
"""Slots whose keys and values a warp brings at a time; new ones are as many at most."""
_QUERIES = 8  # of a block: half of a tensor core's rows, the other half are what rounding left
_MAX_HEAD_SIZE = 128  # a warp's registers hold sums of so many elements
_FEW_ROWS = 16
"""Up to here products are kernels of our own (``TILE_ROWS``), beside which attention begins, but
not where its blocks hold many bytes of shared memory: it is no faster than attention.cu's."""
_WARPS_TOGETHER = 20  # of a processor, with about 100 registers a thread
_MAX_SHARED = 96 * 1024  # bytes that a block may have on every GPU served
_HELD = 256  # slots that a warp looks at before it reads any of them
_PAD = 8  # elements behind a row in shared memory


@dataclass(frozen=True)
class Wide:
    """One launch: the parameters of its template, and its sizes."""

    head_size: int
    rows: int
    queries: int
    """Of a row."""
    heads: int
    group: int
    slots: int
    own: bool
    masked: bool
    turn: str
    splits: int = 1
    warps: int = 8
    stages: int = 1
    """Tiles of a warp that are on their way."""

    @property
    def heads_together(self) -> int:
        """Query heads of a block."""
        return _divisor(self.group, _QUERIES)

    @property
    def queries_together(self) -> int:
        """Query tokens of a block."""
        return _divisor(self.queries, _QUERIES // self.heads_together)

    @property
    def body(self) -> str:
        sizes = f"{self.head_size}, {self.warps}, {self.splits}, {SLOTS}, {self.stages}"
        kind = f"{self.queries_together}, {str(self.own).lower()}, {str(self.masked).lower()}"
        if self.group > 1 or self.turn != "AS_IS":
            kind += f", {self.group}, {self.heads_together}, {self.turn}"
        return f"wide_attention<{sizes}, {kind}>"

    @property
    def grid(self) -> tuple[int, int]:
        pairs = self.heads // self.heads_together
        return pairs * self.splits, self.rows // self.queries_together

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def blocks_together(self) -> int:
        """Blocks that a processor has registers for."""
        return _WARPS_TOGETHER // self.warps if self.head_size <= 64 else 1

    @property
    def shared_bytes(self) -> int:
        """What ``WideShared`` lays out."""
        unit = 32 if self.masked else SLOTS  # slots that warps are dealt
        units = (self.slots + unit - 1) // unit
        held = min(-(-units // (self.warps * self.splits)) * unit, _HELD)
        row, together = 2 * (self.head_size + _PAD), self.queries_together
        tiles = 2 * (self.warps * self.stages + self.own) * SLOTS * row + 16 * row
        parts = together * self.heads_together * self.splits * (self.head_size + 2)
        floats = self.warps * together * (held + _PAD) + (parts if self.splits > 1 else 0)
        floats += together * (SLOTS + _PAD) if self.own else 0
        return tiles + 4 * floats + (2 * self.warps * held if self.masked else 0)


def _divisor(count: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if count % n == 0)


def choose(
    dtype: torch.dtype,
    wide: Wide,
    processors: int,
    clusters: bool,
) -> Wide | None:
    """The launch of ``wide``'s shape, in sizes that suit it; None: attention.cu's kernel is faster,
    or the only one.

    Args:
        dtype: of the numbers; tensor cores take those of 16 bits.
        clusters: whether blocks that share out a row's slots can merge what they found.
    """
    fits = wide.head_size % 16 == 0 and wide.head_size <= _MAX_HEAD_SIZE and wide.queries <= SLOTS
    if dtype.itemsize != 2 or not fits or wide.rows <= _FEW_ROWS:
        return None
    wide = replace(wide, splits=_splits(wide, processors) if clusters else 1)
    return wide if wide.shared_bytes <= _MAX_SHARED else None


def _splits(wide: Wide, processors: int) -> int:
    """Blocks that share out a row's slots: all of them at once on processors of their own, as a
    cluster starts slowly where others run."""
    pairs = wide.grid[0] * wide.grid[1]
    fits = [n for n in (2, 4, 8) if pairs * n <= processors and wide.slots >= 128 * n]
    return max(fits, default=1)
