"""``fastgen bench``: whole calls, measured side by side with other libraries."""

import importlib
from typing import Any

_HOMES = {
    "Encoding": "workload",
    "Entry": "report",
    "Report": "report",
    "Session": "session",
    "Workload": "workload",
    "encoder_grid": "workload",
    "run": "session",
    "standard_grid": "workload",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``fastgen.bench.cli`` does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastgen.bench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastgen.bench.{_HOMES[name]}"), name)
