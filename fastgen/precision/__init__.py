"""fp16, found and proven: which operations need float32 where the others compute in float16."""

from fastgen.precision.find import Kept, Precision, find_unstable

__all__ = ["Kept", "Precision", "find_unstable"]
