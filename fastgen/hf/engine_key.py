"""What a compiled graph of a model depends on: its key in the engine cache."""

import hashlib
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import transformers

from fastgen.target import Target

# Config fields that name where a model came from, not what it computes
_NOT_COMPUTATION = ("_name_or_path", "architectures", "transformers_version", "dtype")


@cache
def _sources_digest() -> str:
    """Digest of the code that writes graphs: when it changes, so do they."""
    package = Path(str(files("fastgen")))
    rooms = [path for room in ("graphs", "models", "ops") for path in (package / room).glob("*.py")]
    digest = hashlib.sha256()
    data = (package / f"{name}.py" for name in ("blockwise", "calibration", "int8", "target"))
    for file in [*data, *sorted(rooms)]:
        name = file.relative_to(package).as_posix()
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def engine_key(name: str, config: Any, target: Target) -> dict[str, Any]:
    """Everything besides parameters that changes a compiled graph: no path, no time.

    Args:
        name: of the module's class.
        config: the module's.
    """
    fields = config.to_dict()
    return {
        "class": name,
        "config": {k: repr(v) for k, v in fields.items() if k not in _NOT_COMPUTATION},
        "target": asdict(target),
        "sources": _sources_digest(),
        **{library.__name__: library.__version__ for library in (transformers, onnx, onnxscript)},
    }
