"""fastgen: Hugging Face text generation, many times faster by changing one import line."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "EngineOptions": "fastgen.options",
    "FallbackWarning": "fastgen.errors",
    "FastAutoModelForSeq2SeqLM": "fastgen.auto",
    "FastMT5EncoderModel": "fastgen.models.mt5",
    "FastMT5ForConditionalGeneration": "fastgen.models.mt5",
    "FastT5": "fastgen.models.t5",
    "FastT5EncoderModel": "fastgen.models.t5",
    "FastT5ForConditionalGeneration": "fastgen.models.t5",
    "FastUMT5EncoderModel": "fastgen.models.umt5",
    "FastUMT5ForConditionalGeneration": "fastgen.models.umt5",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``fastgen cache list`` does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
