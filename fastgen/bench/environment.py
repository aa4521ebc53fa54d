"""Hardware and versions, without which a timing means nothing."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from fastgen.runtime import versions


def environment(device: str) -> dict[str, Any]:
    """Hardware, thread count and versions, JSON-able."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_bytes"] = properties.total_memory
        facts["cuda"] = torch.version.cuda
    return facts | {"versions": {k: v for k, v in versions().items() if v is not None}}


def describe(facts: dict[str, Any]) -> str:
    """One paragraph of ``environment(...)`` for people."""
    hardware = f"{facts['cpu']}, {facts['threads']} of {facts['cpu_count']} threads"
    if "gpu" in facts:
        hardware = f"{facts['gpu']} (CUDA {facts['cuda']}); {hardware}"
    if "copy_gb_per_s" in facts:
        rates = f"copies at {facts['copy_gb_per_s']:,.0f} GB/s"
        hardware += f", {rates}, multiplies at {facts['matmul_tflop_per_s']:,.3g} TFLOP/s"
    packages = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{hardware}; Python {facts['python']}, {packages}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
