"""A forked child: what it has of its parent's engines it can neither run nor destroy.

A session's threads do not exist in the child. It would wait for them: at a run, and, as they are
joined, at its destruction. So the child leaves sessions as they are and builds new ones.
"""

import ctypes
import os
from typing import Any, Protocol
from weakref import WeakSet

import torch


class Owner(Protocol):
    """Whoever holds engines."""

    def forget_engines(self) -> list[Any]:
        """Let go of all engines without destroying them: these are all references to them."""


_sessions: WeakSet[Any] = WeakSet()
_owners: WeakSet[Any] = WeakSet()
_parents_threads: int | None = None
"""What ``torch.get_num_threads()`` was in the parent of this process, where that matters."""


def never_destroy_in_children(session: Any) -> None:
    """Let this object, which runs threads of its own, outlive every process forked from now on."""
    _sessions.add(session)


def forget_in_children(owner: Owner) -> None:
    """In every process forked from now on, let this owner start without engines."""
    _owners.add(owner)


def threads() -> int:
    """CPU threads for an engine: torch's, in a forked child those of its parent."""
    now = torch.get_num_threads()
    return _parents_threads if _parents_threads is not None and now == 1 else now


def _after_fork() -> None:
    global _parents_threads
    inherited = [*_sessions]
    for owner in [*_owners]:
        inherited += owner.forget_engines()
    for thing in inherited:  # for good: not even the end of the interpreter may destroy it
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    if inherited:
        # OpenMP's threads are gone too, and waiting for them is what stock torch does for ever
        _parents_threads = threads()
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
