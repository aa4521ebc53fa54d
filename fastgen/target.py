"""Target: what one backend, on one device, in one dtype can do. Capabilities are data."""

from dataclasses import dataclass
from typing import Literal

KVLayout = Literal["BHLD", "BLHD"]


@dataclass(frozen=True)
class Target:
    """Where a Graph will run, and what is available there.

    Families never look at a Target; ``ops.py`` lowers each operation by these fields.
    """

    backend: str
    """Name of the engine, e.g. ``onnxruntime``."""
    device: str
    """``cpu`` or ``cuda``."""
    dtype: str
    """Compute dtype by torch's name: ``float32``, ``float16`` or ``bfloat16``."""
    kv_layout: KVLayout
    """Order of a KV buffer's axes: B batch, H heads, L slots, D head size."""
    appends_in_attention: bool
    """Attention itself writes new keys and values behind the filled part of a KV buffer;
    otherwise TensorScatter writes them and attention reads the whole buffer."""
    opset: int
    """Version of the standard ONNX operator set."""

    @property
    def residual_dtype(self) -> str:
        """dtype of the residual stream: T5's exceeds float16's range, so float32 carries it."""
        return "float32" if self.dtype == "float16" else self.dtype

    def kv_shape(self, batch: int, heads: int, slots: int, head_size: int) -> tuple[int, ...]:
        """Shape of one KV buffer in this Target's layout."""
        if self.kv_layout == "BHLD":
            return batch, heads, slots, head_size
        return batch, slots, heads, head_size


def onnxruntime_cpu() -> Target:
    """ONNX Runtime's CPU provider: attention appends to the KV buffer; float32 only."""
    return Target("onnxruntime", "cpu", "float32", "BHLD", True, 21)


def onnxruntime_cuda(dtype: str) -> Target:
    """ONNX Runtime's CUDA provider: TensorScatter (opset 24) writes the KV buffer in place."""
    return Target("onnxruntime", "cuda", dtype, "BLHD", False, 24)
