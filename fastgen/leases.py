"""Leases: buckets in use, and those kept for the next call of their size."""

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch

from fastgen.capturing import lasting


class Leased(Protocol):
    """What a pool keeps, such as a ``Bucket``."""

    size: Any

    def clear(self) -> None:
        """Forget the last user's content."""


B = TypeVar("B", bound=Leased)


class BucketPool(Generic[B]):
    """Buckets not in use now, kept for the next call of their size; the oldest go first."""

    def __init__(self, make: Callable[[Any], B], limit: int) -> None:
        self._make, self._limit = make, limit
        self._leased: set[_Due[B]] = set()
        self._ended: deque[_Due[B]] = deque()
        self._idle: list[B] = []
        self._lock = threading.Lock()

    def lease(self, size: Any) -> "Lease[B]":
        """A bucket of this size, for as long as the lease lives."""
        with self._lock:
            self._take_back()
            bucket = next((b for b in reversed(self._idle) if b.size == size), None)
            if bucket is not None:
                self._idle.remove(bucket)
        bucket = bucket or self._allocate(size)
        bucket.clear()
        lease = Lease(bucket)
        due: _Due[B] = _Due(lease, self._ended.append)
        due.bucket = bucket
        self._leased.add(due)
        return lease

    def _allocate(self, size: Any) -> B:
        with lasting():
            try:
                return self._make(size)
            except torch.OutOfMemoryError:
                self.release_idle()
                return self._make(size)

    def _take_back(self) -> None:
        """Under the lock: make what leases have left idle, up to the limit."""
        while self._ended:
            due = self._ended.popleft()
            self._leased.discard(due)
            self._idle.append(due.bucket)
        del self._idle[: -self._limit]

    def idle(self) -> list[B]:
        """The buckets that no cache holds, the last used last."""
        with self._lock:
            self._take_back()
            return [*self._idle]

    def release_idle(self) -> None:
        """Free every bucket that no cache holds, with its captured graphs."""
        with self._lock:
            self._take_back()
            self._idle.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Lease(Generic[B]):
    """A bucket in use; goes back to its pool when nothing refers to it any more."""

    def __init__(self, bucket: B) -> None:
        self.bucket = bucket


class _Due(weakref.ref, Generic[B]):
    """Puts itself, with its bucket, on a list when a lease ends. Memory is freed anywhere, in any
    thread: this runs no Python code, so that no signal's handler can interrupt it, and no lock."""

    bucket: B
