"""torch's caching allocator as C functions, so that an engine's scratch memory is torch's too.

What one of the two frees the other can use, ``torch.cuda.empty_cache()`` gives all of it back, and
running out of memory is torch's own error.
"""

import ctypes
import sys
import threading
from functools import cache
from typing import Any

import torch

_Allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_EmptyCache = ctypes.CFUNCTYPE(None)


class _Failure(threading.local):
    """Why the last allocation of this thread failed: an exception cannot pass through C."""

    error: torch.OutOfMemoryError | None = None


_failure = _Failure()


@cache
def addresses() -> tuple[int, int, int]:
    """Addresses of ``void* allocate(size_t)``, ``void free(void*)`` and ``void empty_cache()``.

    Memory is of torch's current device, and used in the order of its current stream.
    """
    functions = _Allocate(_allocate), _Free(_free), _EmptyCache(_empty_cache)
    for function in functions:  # engines may outlive this module at the end of the process
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(function))
    allocate, free, empty = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions)
    return allocate, free, empty


def failure() -> torch.OutOfMemoryError | None:
    """torch's error of this thread's last failed allocation, told once."""
    error, _failure.error = _failure.error, None
    return error


def _allocate(size: int) -> Any:
    try:
        return torch.cuda.caching_allocator_alloc(size)
    except torch.OutOfMemoryError as error:
        _failure.error = error
        return None


def _free(pointer: int) -> None:
    if not sys.is_finalizing():  # then the driver frees everything
        torch.cuda.caching_allocator_delete(pointer)


def _empty_cache() -> None:
    if not sys.is_finalizing():
        torch.cuda.empty_cache()
