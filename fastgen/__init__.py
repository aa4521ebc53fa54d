"""fastgen: Hugging Face text generation, many times faster by changing one import line."""

import importlib
from typing import TYPE_CHECKING, Any

from fastgen.registry import HOMES as _HOMES

__version__ = "0.1.0"
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:  # the same names again: type checkers do not read a dict
    from fastgen import quantize as quantize
    from fastgen.auto import *
    from fastgen.errors import FallbackWarning as FallbackWarning
    from fastgen.errors import WeightsGoneError as WeightsGoneError
    from fastgen.models.bart import *
    from fastgen.models.bert import *
    from fastgen.models.gpt2 import *
    from fastgen.models.mt5 import *
    from fastgen.models.t5 import *
    from fastgen.models.umt5 import *
    from fastgen.options import EngineOptions as EngineOptions
else:  # of a module with this function, they would take every name for one of its

    def __getattr__(name: str) -> Any:
        """Import a public name on first use, so that ``fastgen cache list`` does not load torch."""
        if name == "quantize":  # a part to be used by its own name
            return importlib.import_module("fastgen.quantize")
        if name not in _HOMES:
            raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
