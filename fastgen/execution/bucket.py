"""Buckets: every tensor of a decoder graph at one size, and the pool they are leased from."""

import copy
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from fastgen.execution.capturing import lasting
from fastgen.graphs.shape import Shape
from fastgen.target import Target


class BucketSize(NamedTuple):
    """What one set of buffers, bindings and captured CUDA graph serves."""

    batch: int
    queries: int
    """Query tokens of one step: 1, or the number of beams that share one KV buffer."""
    slots: int
    """KV cache slots per row (a multiple of ``queries``)."""
    sources: int
    """Source tokens per row, padding included."""


class Bucket:
    """Every tensor of the decoder graph at one size, allocated once.

    ``tensors`` maps graph names to tensors. ``self_kv`` and ``cross_kv`` hold all layers' buffers
    in one allocation each: [2 * layers, *Target.kv_shape], keys and values alternating.
    """

    def __init__(
        self, shape: Shape, target: Target, device: torch.device, size: BucketSize
    ) -> None:
        self.shape, self.target, self.device, self.size = shape, target, device, size
        self.dtype = getattr(torch, target.dtype)
        batch, queries, slots, sources = size
        kv = 2 * shape.layers
        self.self_kv = self._empty(kv, *target.kv_shape(batch, *self._heads(slots)))
        self.cross_kv = self._empty(kv, *target.kv_shape(batch, *self._heads(sources)))
        self.prefix = 0
        """Slots of a prompt that all query tokens of a row share; behind it, each has its own."""
        self.prefix_slots = torch.zeros(1, dtype=torch.int64, device=device)
        """The same, where captured graphs read it."""
        self.tensors = {
            "input_ids": torch.zeros(batch, queries, dtype=torch.int64, device=device),
            "slot_positions": (torch.arange(slots, device=device) // queries).view(1, slots),
            "kept": torch.arange(queries, device=device),
            **self._counters(batch, queries),
        }
        if shape.source:
            self.tensors["cross_mask"] = self._empty(batch, 1, queries, sources)
            self.tensors |= self._kv_tensors("cross", self.cross_kv)
        else:
            self.tensors["row_start"] = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self.owners = torch.zeros(slots, dtype=torch.int64, device=device)
            """Which query token's a slot is, -1 if all share it; of no use without a prefix."""
        self.output(*shape.output)
        if queries > 1 or target.always_masked:  # zero until beams say what hides what
            self.tensors["slot_mask"] = self._empty(batch, 1, queries, slots).zero_()
        self.tensors |= {name: self._empty(*axes) for name, axes in shape.tables.items()}
        self.tensors |= self._kv_tensors("self", self.self_kv)
        self.tensors |= self._kv_tensors("present", self.self_kv)  # updated in place
        self._padded = False
        self.fused = False
        """Whether fastgen's own kernels run its steps."""
        self.steps: dict[Any, Any] = {}
        """Captured graphs of these buffers, by whatever made them."""
        self.prompts: dict[Any, Any] = {}
        """What runs prompts of many tokens over these buffers, likewise."""
        self.bindings: dict[Any, Any] = {}
        """What runs engines over these buffers, likewise."""

    def output(self, name: str, width: int) -> torch.Tensor:
        """What a step writes, [B, Q, width]: made on first use, as a cache may go from a decoder
        with a head to one without."""
        if name not in self.tensors:
            with lasting():
                self.tensors[name] = self._empty(self.size.batch, self.size.queries, width)
        return self.tensors[name]

    def without_steps(self) -> "Bucket":
        """The same buffers for what a step itself keeps: with the steps, nothing would be freed."""
        same = copy.copy(self)
        same.steps, same.bindings, same.prompts = {}, {}, {}
        return same

    def _counters(self, batch: int, queries: int) -> dict[str, torch.Tensor]:
        """Where the next query tokens stand. On a GPU one tensor, so that one kernel moves on."""
        if self.target.appends_in_attention:
            first_slot = torch.zeros(1, dtype=torch.int32, device=self.device)
            positions = torch.zeros(queries, 1, dtype=torch.int64, device=self.device)
            return {"query_positions": positions, "first_slot": first_slot}
        slot = -(-queries // 32) * 32  # TensorRT wants tensors to begin at multiples of 256 bytes
        self._counts = torch.zeros(slot + batch, dtype=torch.int64, device=self.device)
        steps = [1] * slot + [queries] * batch
        self._steps = torch.tensor(steps, dtype=torch.int64, device=self.device)
        positions, first_slot = self._counts[:queries], self._counts[slot:]
        return {"query_positions": positions[:, None], "first_slot": first_slot}

    def share_prefix(self, length: int) -> None:
        """Say that all query tokens of a row share its first ``length`` slots."""
        if length == self.prefix:
            return
        slots, queries = torch.arange(self.size.slots, device=self.device), self.size.queries
        places = torch.where(slots < length, slots, length + (slots - length) // queries)
        self.tensors["slot_positions"].copy_(places[None])
        self.owners.copy_(torch.where(slots < length, -1, (slots - length) % queries))
        self.prefix = length
        self.prefix_slots.fill_(length)

    def slots_of(self, length: int) -> int:
        """How many slots hold ``length`` tokens of each sequence."""
        return min(length, self.prefix) + max(0, length - self.prefix) * self.size.queries

    def start_rows(self, starts: torch.Tensor | None) -> None:
        """Let rows begin at the slots ``starts`` [B, 1]; None: at the first."""
        if starts is not None:
            self.tensors["row_start"].copy_(starts)
        elif self._padded:
            self.tensors["row_start"].zero_()
        self._padded = starts is not None

    def seek(self, length: int) -> None:
        """Let the next query tokens follow ``length`` tokens."""
        self.tensors["query_positions"].fill_(length)
        self.tensors["first_slot"].fill_(self.slots_of(length))

    def advance(self) -> None:
        """Let the next query tokens follow one token more; queued on the device."""
        if self.target.appends_in_attention:
            self.tensors["query_positions"].add_(1)
            self.tensors["first_slot"].add_(self.size.queries)
        else:
            self._counts.add_(self._steps)

    def mutable(self) -> list[torch.Tensor]:
        """What a step changes besides the KV buffers, whose slot it only writes again."""
        return [self.tensors[name] for name in ("input_ids", "query_positions", "first_slot")]

    def _heads(self, slots: int) -> tuple[int, int, int]:
        return self.shape.stored_heads, slots, self.shape.head_size

    def _empty(self, *axes: int) -> torch.Tensor:
        return torch.empty(axes, dtype=self.dtype, device=self.device)

    def _kv_tensors(self, prefix: str, buffers: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.target.kv_layout == "BLHD":
            buffers = buffers.flatten(-2)
        return dict(zip(self.shape.kv_names(prefix), buffers.unbind(0), strict=True))

    def layer(self, buffers: torch.Tensor, index: int, length: int) -> torch.Tensor:
        """One buffer's first ``length`` slots as Hugging Face sees them: view [B, H, length, D]."""
        buffer = buffers[index]
        if self.target.kv_layout == "BLHD":
            buffer = buffer.transpose(1, 2)
        return buffer[:, :, :length]

    def filled(self, buffers: torch.Tensor, length: int) -> torch.Tensor:
        """The first ``length`` slots of all layers' buffers, a view."""
        axis = -3 if self.target.kv_layout == "BLHD" else -2
        return buffers.narrow(axis, 0, length)

    def clear(self) -> None:
        """Forget the last user's tokens: attention reads all slots, and NaN survives a mask."""
        self.share_prefix(0)
        if not self.target.appends_in_attention:
            self.self_kv.zero_()

    def take_over(self, old: "Bucket") -> None:
        """What all tokens of a call read, from a bucket of another number of slots."""
        shared = ("cross_mask",) if self.shape.source else ("row_start",)
        for name in (*shared, *self.shape.tables):
            self.tensors[name].copy_(old.tensors[name])
        self._padded = old._padded
        if self.shape.source:
            self.cross_kv.copy_(old.cross_kv)  # padding too: it must be finite
        self.share_prefix(old.prefix)

    def reorder(self, rows: torch.Tensor, length: int) -> None:
        """Row i takes the keys and values of row ``rows[i]``."""
        for buffers, slots in ((self.self_kv, length), (self.cross_kv, self.size.sources)):
            filled = self.filled(buffers, slots)
            filled.copy_(filled.index_select(1, rows.to(self.device)))


class BucketPool:
    """Buckets not in use now, kept for the next call of their size; the oldest go first."""

    def __init__(self, make: Callable[[BucketSize], Bucket], limit: int) -> None:
        self._make, self._limit = make, limit
        self._leased: set[_Due] = set()
        self._ended: deque[_Due] = deque()
        self._idle: list[Bucket] = []
        self._lock = threading.Lock()

    def lease(self, size: BucketSize) -> "Lease":
        """A bucket of this size, for as long as the lease lives."""
        with self._lock:
            self._take_back()
            bucket = next((b for b in reversed(self._idle) if b.size == size), None)
            if bucket is not None:
                self._idle.remove(bucket)
            # so that no more are kept once those in use have come back
            del self._idle[: max(0, len(self._idle) + len(self._leased) + 1 - self._limit)]
        bucket = bucket or self._allocate(size)
        bucket.clear()
        lease = Lease(bucket)
        due = _Due(lease, self._ended.append)
        due.bucket = bucket
        self._leased.add(due)
        return lease

    def _allocate(self, size: BucketSize) -> Bucket:
        with lasting():
            try:
                return self._make(size)
            except torch.OutOfMemoryError:
                self.release_idle()
                return self._make(size)

    def _take_back(self) -> None:
        """Under the lock: make what leases have left idle."""
        while self._ended:
            due = self._ended.popleft()
            self._leased.discard(due)
            self._idle.append(due.bucket)

    def idle(self) -> list[Bucket]:
        """The buckets that no cache holds, the last used last."""
        with self._lock:
            self._take_back()
            return [*self._idle]

    def release_idle(self) -> None:
        """Free every bucket that no cache holds, with its captured graphs."""
        with self._lock:
            self._take_back()
            self._idle.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Lease:
    """A bucket in use; goes back to its pool when nothing refers to it any more."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket


class Leases(Protocol):
    """A KV cache as a decoder knows it: it leases buckets, and is told what they hold."""

    @property
    def bucket(self) -> Bucket | None:
        """The leased bucket, if it has all of the cache's content."""

    def get_seq_length(self) -> int:
        """Tokens held."""

    def lease(self, pool: BucketPool, size: BucketSize, fresh: bool = False) -> Bucket:
        """Lease a bucket of ``size``, with this cache's content; ``fresh`` leaves what the cross
        graph computes to be filled."""

    def move_in(self, sources: int) -> None:
        """Say that the leased bucket holds all content."""

    def fill(self, length: int, sources: int | None = None) -> None:
        """Say that the bucket holds ``length`` tokens (and ``sources`` source tokens)."""


class _Due(weakref.ref):
    """Puts itself, with its bucket, on a list when a lease ends. Memory is freed anywhere, in any
    thread: this runs no Python code, so that no signal's handler can interrupt it, and no lock."""

    bucket: Bucket
