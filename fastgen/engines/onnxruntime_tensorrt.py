"""ONNX Runtime's TensorRT provider: its options, and which provider runs which operator."""

import importlib
from collections import Counter
from typing import Any

import torch

from fastgen import cuda, runtime
from fastgen.engine_cache import EngineCache
from fastgen.engines.side_file import gpu_model
from fastgen.errors import MissingRuntimeError
from fastgen.options import EngineOptions
from fastgen.target import Target

NAME = "onnxruntime-tensorrt"
PROVIDER = "TensorrtExecutionProvider"
_INSTALL = f'pip install "fastgen[{NAME}]"'


def check() -> None:
    """Load TensorRT's libraries, which pip puts where ONNX Runtime does not look.

    Raises:
        MissingRuntimeError: the provider or TensorRT 10 is not there; the message holds the command
            that installs it.
    """
    module = runtime.onnxruntime()
    if PROVIDER not in module.get_available_providers():
        raise MissingRuntimeError(
            f"the installed ONNX Runtime {module.__version__} has no {PROVIDER}. "
            f"Run: pip uninstall -y onnxruntime && {_INSTALL}"
        )
    try:
        version = importlib.import_module("tensorrt").__version__
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingRuntimeError(
            f"{PROVIDER} needs TensorRT 10, which does not import ({error}). Run: {_INSTALL}"
        ) from error
    if not version.startswith("10."):
        raise MissingRuntimeError(
            f"{PROVIDER} needs TensorRT 10; {version} is installed. Run: {_INSTALL}"
        )


def provider(
    target: Target, device: torch.device, options: EngineOptions
) -> tuple[str, dict[str, str]]:
    """The provider and its options, all of them strings."""
    settings = {
        "device_id": str(device.index or 0),
        "user_compute_stream": str(cuda.engine_stream(device).cuda_stream),
        "trt_fp16_enable": str(int(target.dtype == "float16")),
        "trt_bf16_enable": str(int(target.dtype == "bfloat16")),
        "trt_builder_optimization_level": str(options.build_level),
    }
    if options.build_memory_mb is not None:
        settings["trt_max_workspace_size"] = str(options.build_memory_mb * 2**20)
    if options.disk_cache:
        # its file names tell none of these from another
        effort = f"level-{options.build_level}-memory-{options.build_memory_mb}"
        folder = EngineCache(options.cache_dir).folder / NAME / gpu_model(device) / effort
        settings |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        }
    return PROVIDER, settings


def partition(session: Any) -> dict[str, dict[str, int]]:
    """How many operators of each kind each provider of a session runs."""
    report: dict[str, Counter[str]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        nodes = [node.op_type for node in subgraph.get_nodes()]
        report.setdefault(subgraph.ep_name, Counter()).update(nodes)
    return {name: dict(counts) for name, counts in report.items()}
