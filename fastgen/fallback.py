"""A fall-back is said once: which reason sent a model's calls to a slower path, and the remedy."""

import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch

from fastgen.errors import FallbackWarning

# Frames that stand between the user's line and a report
_LIBRARIES = ("fastgen", "torch", "transformers", "accelerate", "peft", "contextlib", "functools")

# What differs between two texts of one reason: sizes, and the part that it was found in
_DETAILS = re.compile(r"\(.*?\)|\d+")

_PATHS = {
    "torch": "runs on torch, no faster than the stock class",
    "HF loop": "decodes in Hugging Face's loop, not in the fast loop",
}

AUTOCAST = (
    "torch.autocast is on (Trainer(bf16=True) and Accelerator(mixed_precision=...) put it around "
    "model.forward): load the model in the dtype to compute in instead"
)

_lock = threading.Lock()


class _Said(threading.local):
    """Whether this thread is within a whole model's call on torch, of which all was said."""

    outer = False


_inside = _Said()


@contextmanager
def said() -> Iterator[None]:
    """Within a whole model's call on torch, torch calls its stacks: they report nothing."""
    outer, _inside.outer = _inside.outer, True
    try:
        yield
    finally:
        _inside.outer = outer


class Asked(str):
    """A reason that the call or an option asks for in so many words: nobody is surprised."""


def report(model: Any, to: Literal["torch", "HF loop"], reason: str) -> None:
    """Warn that ``reason`` sends calls of ``model`` to a slower path: once per model and reason.

    Args:
        model: the Fast model (or encoder) that was called; its encoder counts as the same model.
        to: the path that serves instead.
        reason: why, with the remedy. What stands in brackets, and numbers, make no other reason.
    """
    if torch.compiler.is_compiling() or _inside.outer or isinstance(reason, Asked):
        return
    told = vars(model).get("_reported")
    if told is not None and (to, reason) in told:
        return
    options = model.engine_options
    if not options.warn_fallback or options.backend == "torch":
        return
    kind = to, _DETAILS.sub("", reason)
    with _lock:
        told = _told(model)
        known = kind in told
        if len(told) < 1000:  # texts are kept for a quick look only
            told.add((to, reason))
        told.add(kind)
    if not known:
        warnings.warn(
            f"{type(model).__qualname__} {_PATHS[to]}: {reason}. Said once; model.explain() names "
            "the reasons, EngineOptions(warn_fallback=False) switches this warning off.",
            FallbackWarning,
            stacklevel=_users_level(),
        )


def runs_under_autocast(forward: Any) -> bool:
    """Whether a ``forward`` was wrapped by ``torch.autocast``, as Accelerate wraps it."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        for cell in getattr(function, "__closure__", None) or ():
            with suppress(ValueError):  # an empty cell
                if isinstance(cell.cell_contents, torch.autocast) and cell.cell_contents._enabled:
                    return True
        forward = getattr(function, "__wrapped__", None)
    return False


def _told(model: Any) -> set[tuple[str, str]]:
    """What was said of a model: one set for the whole and its parts, whoever reports first."""
    said: set[tuple[str, str]] | None = vars(model).get("_reported")
    if said is None:
        parts = [part for part in model.modules() if hasattr(part, "engine_options")]
        said = set().union(*(vars(part).get("_reported") or () for part in parts))
        for part in parts:
            part._reported = said
    return said


def _users_level() -> int:
    """``stacklevel``, as seen from ``report``, of the nearest frame outside of the libraries."""
    level, frame = 1, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        if frame.f_back is None:
            return 1  # a thread that only libraries started
        level, frame = level + 1, frame.f_back
    return level
