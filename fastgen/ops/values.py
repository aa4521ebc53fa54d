"""What operations take and give; the letters of shapes are those of ``standard.py``."""

from dataclasses import dataclass
from typing import Any, TypeAlias

Value: TypeAlias = Any  # an onnx_ir.Value, whose package carries no types


@dataclass(frozen=True)
class Groups:
    """Query heads that share keys and values."""

    count: int
    """Groups: heads of keys and values."""
    size: int
    """Query heads of a group, which lie next to each other."""
    head_size: int


@dataclass(frozen=True)
class KVSlots:
    """One layer's KV buffers and where the query tokens' keys and values go."""

    key: Value  # Target.kv_shape, or its BLHD axes H and D merged
    value: Value
    first_slot: Value  # int32 [1] on the CPU (also the filled length), int64 [B] on a GPU
    groups: Groups | None = None  # None: each query head has keys and values of its own


@dataclass(frozen=True, eq=False)
class Angles:
    """By how much heads are turned: of each query token its position's."""

    positions: Value
    """int64 [B or 1, Q]."""
    cosines: Value
    """float32 [B or 1, Q, D / 2]."""
    sines: Value
    """The same."""
    frequencies: int
    """D / 2."""


@dataclass(frozen=True, eq=False)
class Bias:
    """What attention over KV slots adds to its scores, as a description: each lowering spells it
    out as late as it can, once for all layers that share it.

    No query sees a later position.
    """

    query_positions: Value
    """int64 [Q, 1]."""
    slot_positions: Value
    """int64 [1, L]."""
    row_start: Value | None = None
    """int64 [B, 1]: the slot of each row's first token; None: all begin at the first."""
    mask: Value | None = None
    """Added, [B, 1, Q, L]: what beams see of each other's slots."""
    table: Value | None = None
    """Added by distance, [1, H, T]: slot minus query position, clipped to ``-reach .. 1``, indexed
    as Python lists are. Where there is a table, it is what hides later positions: at distance 1."""
    reach: int = 0
    """The farthest distance that the table knows."""
