"""EngineOptions: everything a user may choose about engines, in one place."""

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastgen.errors import OptionError

Kind = Literal["int8", "int4", "fp8"]
"""How weights of fewer bits are held (see ``blockwise.py``)."""
Weights = Literal["full", Kind]
ENVIRONMENT_VARIABLE = "FASTGEN_ENGINE_OPTIONS"
# Threads beyond the machine's only wait for each other, and thousands take minutes to start; 64
# are allowed everywhere, so that a server's options do for a smaller machine's tests.
_MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))
# Longer sequences move to larger buckets: this only keeps a first bucket from asking for terabytes.
_MAX_MIN_BUCKET = 65_536
#: Option -> the lowest and the highest number that is allowed; None is without an end.
_LIMITS: dict[str, tuple[float, float | None]] = {
    "max_cached_graphs": (1, None),
    "min_bucket": (1, _MAX_MIN_BUCKET),
    "prefill_tokens": (1, None),
    "intra_op_threads": (1, _MAX_THREADS),
    "prepack": (0, 1),
    "max_batch": (1, None),
    "max_source_tokens": (1, None),
    "build_level": (0, 5),
    "build_memory_mb": (1, None),
    "build_seconds": (1, None),
}


@dataclass(frozen=True)
class EngineOptions:
    """Options of a model's engines; pass as ``from_pretrained(..., engine_options=...)``.

    The environment variable ``FASTGEN_ENGINE_OPTIONS`` ("key=value,key=value") gives defaults
    that an explicit option overrides.
    """

    backend: Literal[
        "auto", "onnxruntime", "tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt", "torch"
    ] = "auto"
    """Which engine runs the graphs; ``auto`` is ``onnxruntime``, ``torch`` switches engines off
    (the slow reference)."""
    fast_loop: bool = True
    """Decode with fastgen's own loop where it is proven equal; False always takes the HF loop."""
    check_fast_loop: bool = False
    """Debug: run each ``generate`` through both loops and raise if a token differs."""
    warn_fallback: bool = True
    """Warn once per model and reason (``FallbackWarning``) when calls run on torch, or in the HF
    loop instead of the fast loop, and nothing in the call or the options asked for that."""
    cuda_graphs: bool = True
    """Capture one CUDA graph per bucket; False launches every kernel of every step."""
    fused_kernels: bool = True
    """Run steps of up to 512 rows, and encoders (T5's in 16 bits), by fastgen's own CUDA kernels;
    False runs ONNX Runtime's."""
    max_cached_graphs: int = 8
    """How many idle KV cache buckets (buffers and captured CUDA graphs) a model keeps for reuse,
    and how many sizes of its encoder."""
    min_bucket: int = 64
    """Smallest number of KV cache slots (tokens) per sequence, up to 65,536; buckets double from
    here."""
    prefill_tokens: int = 4096
    """How many tokens of a prompt, of all rows together, one run reads; longer prompts are run in
    pieces, so that attention's scores take no more memory."""
    intra_op_threads: int | None = None
    """CPU threads of an engine, up to four for each CPU (or 64); None takes
    ``torch.get_num_threads()``."""
    prepack: float = 0.25
    """On the CPU, share of the weights (bytes) to hold a second time in the layout of its matrix
    kernels, which read them faster: 0 is none of them, 1 all, most of all for beams and long
    sources. With more than 0 each call begins with a pass over them, which tells of edits."""
    weights: Weights = "full"
    """What matrix products read: the model's weights as they are, or made of them once and rounded:
    8-bit or 4-bit integers in blocks with a scale each, or on a GPU 8-bit floats (``fp8``). An
    encoder on a GPU rounds what it multiplies 8-bit integers by, too."""
    keep_torch_weights: bool = True
    """Whether torch keeps the weights of which fewer bits were made, or of 16 bits, on a CPU, a
    float32 copy; False lets them go once engines are built, and what then needs torch (saving,
    moving, a call that no engine serves) raises ``WeightsGoneError``."""
    skip_padding: bool = True
    """BERT's encoder, and T5's on a GPU, compute nothing for the padding of a ragged batch, and
    hidden states there are zeros; False computes them as the stock model does."""
    max_batch: int = 64
    """TensorRT: most rows (batch times beams) of a call; torch serves more."""
    max_source_tokens: int = 1024
    """TensorRT: most tokens of a source (prompt of an encoder); torch serves longer ones."""
    build_level: int = 3
    """TensorRT: how long its builder searches for faster kernels, from 0 to 5."""
    build_memory_mb: int | None = None
    """TensorRT: most scratch memory (MiB) of one operation; None leaves it to TensorRT."""
    build_seconds: int | None = None
    """TensorRT: seconds after which building one graph is given up with an error."""
    disk_cache: bool = True
    """Keep compiled engines in the engine cache on disk."""
    cache_dir: Path | None = None
    """Folder of the engine cache; None takes ``FASTGEN_CACHE`` or the user's cache folder."""

    def __post_init__(self) -> None:
        folder: Any = self.cache_dir
        if isinstance(folder, str):
            object.__setattr__(self, "cache_dir", Path(folder))
        for name, kind in get_type_hints(type(self)).items():
            _check(name, getattr(self, name), kind)
        for name, limits in _LIMITS.items():
            _check_limits(name, getattr(self, name), *limits)

    @classmethod
    def resolve(cls, value: "EngineOptions | Mapping[str, Any] | None" = None) -> "EngineOptions":
        """Merge the environment variable with explicit options (which win).

        Raises:
            OptionError: an unknown name (the nearest right one is given) or a wrong value.
        """
        if isinstance(value, EngineOptions):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise OptionError(f"engine_options={value!r}: expected EngineOptions, a dict or None.")
        merged = _from_environment(os.environ.get(ENVIRONMENT_VARIABLE, ""))
        merged.update(value or {})
        names = [field.name for field in dataclasses.fields(cls)]
        for name in merged:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise OptionError(
                    f"Unknown engine option {name!r}.{hint} Known options: {', '.join(names)}."
                )
        return cls(**merged)


def _from_environment(text: str) -> dict[str, Any]:
    """Parse "key=value,key=value", converting values to the types of the dataclass fields."""
    hints = get_type_hints(EngineOptions)
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise OptionError(f"{ENVIRONMENT_VARIABLE}: {item!r} is not of the form key=value.")
        options[name] = _convert(name, value, hints.get(name, str))
    return options


def _convert(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        truth = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in truth:
            raise OptionError(f"{ENVIRONMENT_VARIABLE}: {name}={text!r}: expected true or false.")
        return truth[text.lower()]
    if int in (kind, *get_args(kind)):
        try:
            return int(text)
        except ValueError:
            raise OptionError(
                f"{ENVIRONMENT_VARIABLE}: {name}={text!r}: expected a whole number."
            ) from None
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise OptionError(
                f"{ENVIRONMENT_VARIABLE}: {name}={text!r}: expected a number."
            ) from None
    return Path(text) if Path in get_args(kind) else text


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise OptionError unless ``value`` is of ``kind`` (a type, a union of types or a Literal)."""
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            raise OptionError(
                f"EngineOptions.{name}={value!r}: allowed are {', '.join(map(repr, allowed))}."
            )
        return
    kinds = get_args(kind) or (kind,)
    numbers = (int, float) if kind is float else kinds
    if not isinstance(value, numbers) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise OptionError(f"EngineOptions.{name}={value!r}: expected {expected}.")


def _check_limits(name: str, value: float | None, low: float, high: float | None) -> None:
    """Raise OptionError unless ``value`` is None or between ``low`` and ``high``."""
    if value is None or (value >= low and (high is None or value <= high)):
        return
    allowed = f"must be at least {low}" if high is None else f"allowed are {low} to {high}"
    raise OptionError(f"EngineOptions.{name}={value}: {allowed}.")
