"""GPU memory of this process alone: other processes may come and go on the same GPU."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from tests.gpu.models import DEVICE

MIB = 2**20
_UNKNOWN = 2**64 - 1


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


@cache
def _nvml() -> tuple[Any, Any] | None:
    """NVML and its handle of the GPU; None where there is none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return None
    return library, handle


def by_process() -> dict[int, int]:
    """Bytes that each process holds, as far as the driver tells: containers hide it at times."""
    if _nvml() is None:
        return {}
    library, handle = _nvml()  # type: ignore[misc]
    count, processes = ctypes.c_uint(256), (_Process * 256)()
    if library.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), processes):
        return {}
    return {p.pid: p.used for p in processes[: count.value] if p.used != _UNKNOWN}


@cache
def own_pid() -> int | None:
    """This process as NVML numbers it, which outside of a container may be another number: the
    one whose memory grows by what is allocated here."""
    torch.cuda.empty_cache()
    before, size = by_process(), 98 * MIB
    block = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    after = by_process()
    del block
    torch.cuda.empty_cache()
    grown = [pid for pid, used in after.items() if used - before.get(pid, 0) == size]
    if os.getpid() in grown:
        return os.getpid()
    return grown[0] if len(grown) == 1 else None


def used() -> int:
    """Bytes that this process holds once idle memory was given back: by whichever allocator, or
    where the driver does not tell, by torch's."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return by_process().get(own_pid() or -1, torch.cuda.memory_reserved(DEVICE))


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """Let torch allocate only so many bytes more in this process during the body."""
    used()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    limit = torch.cuda.memory_reserved(DEVICE) + more
    torch.cuda.set_per_process_memory_fraction(limit / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
