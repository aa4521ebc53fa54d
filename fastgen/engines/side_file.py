"""Small files beside the engine cache's entries that only save time: losing one costs a rebuild."""

import contextlib
import os
import re
from pathlib import Path

import torch


def gpu_model(device: torch.device) -> str:
    """The model of a GPU, fit for file names, e.g. "sm90-NVIDIA-H100-80GB-HBM3-132".

    TensorRT's plans and timings are for one model: an H100 and an H200 have the same compute
    capability and other clocks, memory and caches. The number of processors tells the slices of a
    divided GPU apart. Plans for a whole compute capability (``HardwareCompatibilityLevel``) would
    do without cuBLAS's kernels and may be slower, to save one build on each model.
    """
    properties = torch.cuda.get_device_properties(device)
    name = re.sub(r"\W+", "-", properties.name).strip("-")
    processors = properties.multi_processor_count
    return f"sm{properties.major}{properties.minor}-{name}-{processors}"


class SideFile:
    """Bytes that a library grows from use to use, such as the timings of its kernels."""

    def __init__(self, folder: Path | None, name: str) -> None:
        """
        Args:
            folder: the engine cache's; None keeps nothing.
        """
        self._path = None if folder is None else folder / name

    def read(self) -> bytes:
        """What was written last; empty where there is nothing."""
        with contextlib.suppress(OSError):
            return b"" if self._path is None else self._path.read_bytes()
        return b""

    def write(self, data: bytes) -> None:
        """Replace it whole; of two writers at once, the later wins. A bad disk keeps nothing."""
        if self._path is None:
            return
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, self._path)
