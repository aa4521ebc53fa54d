"""Target: what one backend, on one device, in one dtype can do. Capabilities are data."""

from dataclasses import dataclass, field, replace
from typing import Literal

from fastgen.calibration import Calibration
from fastgen.options import Weights

KVLayout = Literal["BHLD", "BLHD"]


@dataclass(frozen=True)
class Target:
    """Where a Graph will run, and what is available there.

    Families never look at a Target; ``ops/`` lowers each operation by these fields.
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
    contrib: bool
    """ONNX Runtime's own operators (com.microsoft) exist; otherwise standard ones only."""
    always_masked: bool
    """One decoder graph serves beams too: every step and prefill reads a mask over KV slots, which
    is all zeros without beams. For engines that take long to compile, or that hold weights."""
    static_slots: bool
    """The number of KV slots is fixed when the decoder graph is built: one graph per number."""
    captured: bool
    """A run can be captured in a CUDA graph."""
    attends: bool = True
    """The standard operator Attention is served in any head size and dtype; otherwise it is written
    as its products and Softmax."""
    wide: tuple[str, ...] | None = None
    """In float16: names of the operations (see ``ops/names.py``) whose results are float32, as
    ``fastgen.precision`` found them; None: the rules of ``ops/``, which keep the residual stream
    and what is added to it in float32."""
    weights: Weights = "full"
    """What ``Ops.linear`` multiplies by: parameters as they are, or made of them once (see
    ``blockwise.py``)."""
    group: int = 0
    """Inputs of such a weight that share a scale; 0 is a whole row."""
    held: bool = False
    """Some parameters are a checkpoint's in fewer bits, and tell so themselves (``FORM`` of
    ``ops/quantised.py``)."""
    integers: bool = False
    """Products of 8-bit integers exist: what a calibration asks for is served."""
    saturates: bool = False
    """Products of uint8 and int8 overflow 16 bits on this processor, so that weights are uint8."""
    calibration: Calibration | None = field(default=None, hash=False)
    """Ranges of the inputs of linear layers, whose products then are of 8-bit integers."""

    @property
    def narrow(self) -> bool:
        """Whether products read weights of fewer bits."""
        return self.weights != "full" or self.held

    @property
    def residual_dtype(self) -> str:
        """dtype of hidden states as outputs, and unless ``wide`` says otherwise of the residual
        stream: T5's exceeds float16's range, so float32 carries it."""
        return "float32" if self.dtype == "float16" else self.dtype

    def kv_shape(self, batch: int, heads: int, slots: int, head_size: int) -> tuple[int, ...]:
        """Shape of one KV buffer in this Target's layout."""
        if self.kv_layout == "BHLD":
            return batch, heads, slots, head_size
        return batch, slots, heads, head_size


def onnxruntime_cpu(saturates: bool = False) -> Target:
    """ONNX Runtime's CPU provider: attention appends to the KV buffer; float32 only."""
    return Target(
        "onnxruntime",
        "cpu",
        "float32",
        kv_layout="BHLD",
        appends_in_attention=True,
        opset=21,
        contrib=True,
        always_masked=True,
        static_slots=False,
        captured=False,
        integers=True,
        saturates=saturates,
    )


def onnxruntime_cuda(dtype: str) -> Target:
    """ONNX Runtime's CUDA provider: TensorScatter (opset 24) writes the KV buffer in place."""
    return Target(
        "onnxruntime",
        "cuda",
        dtype,
        kv_layout="BLHD",
        appends_in_attention=False,
        opset=24,
        contrib=True,
        always_masked=False,
        static_slots=False,
        captured=True,
    )


def tensorrt(dtype: str, backend: str = "tensorrt") -> Target:
    """TensorRT, or TensorRT for RTX (``backend="tensorrt-rtx"``): standard operators alone, typed
    strongly."""
    return Target(
        backend,
        "cuda",
        dtype,
        kv_layout="BHLD",
        appends_in_attention=False,
        opset=24,
        contrib=False,
        always_masked=True,
        static_slots=True,
        captured=True,
        integers=True,
    )


def onnxruntime_tensorrt(dtype: str) -> Target:
    """ONNX Runtime's TensorRT provider, its CUDA provider for what TensorRT does not take."""
    # Nothing says that the provider's runs, which may build plans anew, can be captured. TensorRT
    # refuses an Attention that no fused kernel of it serves, unless the node has an attribute that
    # ONNX Runtime refuses (TRT_decomposable); it fuses products and Softmax where it can.
    target = tensorrt(dtype, backend="onnxruntime-tensorrt")
    return replace(target, captured=False, attends=False)
