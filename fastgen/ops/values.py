"""What operations take and give; the letters of shapes are those of ``standard.py``."""

from dataclasses import dataclass
from typing import Any, TypeAlias

Value: TypeAlias = Any  # an onnx_ir.Value, whose package carries no types


@dataclass(frozen=True)
class KVSlots:
    """One layer's KV buffers and where the query tokens' keys and values go."""

    key: Value  # Target.kv_shape, or its BLHD axes H and D merged
    value: Value
    first_slot: Value  # int32 [1] on the CPU (also the filled length), int64 [B] on a GPU
