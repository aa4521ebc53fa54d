"""A stand-in for TensorRT, which "builds" ONNX and computes by ONNX Runtime on the CPU.

It has the calls that ``fastgen/engines/tensorrt*.py`` make, and refuses what the documents of
TensorRT forbid: unset shapes or addresses, sizes outside of the profile, too little scratch memory,
an updated buffer whose output has another address, and caches and plans of another device. It is
seen through ``strict_tensorrt.Module``, which lets nothing pass that real bindings would refuse.
"""

import ctypes
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fastgen import cuda
from fastgen.engines import tensorrt, tensorrt_build
from fastgen.hf import building
from fastgen.target import tensorrt as tensorrt_target
from tests.engines.strict_tensorrt import Module

RTX = "tensorrt-rtx-1.7.1.116"
SCRATCH = 4096  # bytes that every context asks for
DEVICE = "device"  # the properties of the GPU that caches and plans are made for
_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def error(logger: Any, message: str) -> None:
    assert logger._initialised
    logger.log(logger.ERROR, message)


class Builder:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> "Network":
        return Network()

    def create_builder_config(self) -> "Config":
        return Config(self.logger)

    def create_optimization_profile(self) -> dict[str, Any]:
        return Profile()

    def build_serialized_network(self, network: "Network", config: "Config") -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("build", None, 2)
        steps = [monitor.step_complete("build", step) for step in range(2)]
        monitor.phase_finish("build")
        if not all(steps):
            return None
        fed = {info.name for info in network.model.graph.input}
        for profile in config.profiles:
            if unknown := profile.keys() - fed:
                error(self.logger, f"{sorted(unknown)} are no inputs")
                return None
        (config.cache or TimingCache()).entries += b"+"
        about = {"device": DEVICE, "profiles": json.dumps(config.profiles)}
        onnx.helper.set_model_props(network.model, about)
        plan: bytes = network.model.SerializeToString()
        return plan


class Network:
    model: onnx.ModelProto

    @property
    def num_layers(self) -> int:
        return len(self.model.graph.node)

    def get_layer(self, index: int) -> "Layer":
        return Layer(self.model.graph.node[index])


class Layer:
    def __init__(self, node: onnx.NodeProto) -> None:
        attention = node.op_type == "Attention"
        self.type = "ATTENTION_INPUT" if attention else "SHUFFLE"
        self.attention = Attention()


class Attention:
    decomposable = False


class OnnxParser:
    def __init__(self, network: Network, logger: Any) -> None:
        self.network, self.errors = network, []

    def parse(self, model: bytes, path: str = "") -> bool:
        self.network.model = onnx.load_from_string(model)
        nodes = list(enumerate(self.network.model.graph.node))
        self.errors = [Refused(i, node) for i, node in nodes if not onnx.defs.has(node.op_type)]
        return not self.errors

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> "Refused":
        return self.errors[index]


class Refused:
    """An error of the parser."""

    def __init__(self, index: int, node: onnx.NodeProto) -> None:
        self.node, self.node_name = lambda: index, lambda: str(node.name)
        self.node_operator, self.desc = lambda: str(node.op_type), lambda: "no importer"


class Profile(dict[str, Any]):
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self[input] = [list(min), list(max)]


class TimingCache:
    def __init__(self, data: bytes = b"") -> None:
        device, _, self.entries = data.partition(b":")
        self.device = device.decode() if data else DEVICE

    def serialize(self) -> bytes:
        return self.device.encode() + b":" + self.entries


class Config:
    progress_monitor: Any = None
    builder_optimization_level = 3
    num_compute_capabilities = 0

    def __init__(self, logger: Any) -> None:
        self.logger, self.cache = logger, None
        self.profiles: list[Profile] = []

    def set_flag(self, flag: Any) -> None: ...

    def clear_flag(self, flag: Any) -> None: ...

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        return index < self.num_compute_capabilities

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        if serialized_timing_cache and b":" not in serialized_timing_cache:
            error(self.logger, "no timing cache")
            return None
        return TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if cache.device != DEVICE and not ignore_mismatch:
            error(self.logger, "a timing cache of another device")
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class Context:
    def __init__(self, engine: "Engine") -> None:
        self.engine, self.active_optimization_profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.active_optimization_profile = profile_index
        self.shapes = {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.engine.profiles[self.active_optimization_profile][name]
        sizes = zip(low, shape, high, strict=True)
        if not all(least <= size <= most for least, size, most in sizes):
            return self.engine.fail(f"{name} is {shape}, not {low} to {high}")
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return name in self.engine.names or self.engine.fail(f"{name} is no tensor")

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = size if memory else 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self.engine
        if missing := engine.names - self.addresses.keys():
            return engine.fail(f"no address of {sorted(missing)}")
        if self.memory < SCRATCH:
            return engine.fail("too little device memory")
        for output, source in engine.pairs.items():
            if self.addresses[output] != self.addresses[source]:
                return engine.fail(f"{output} and {source} must share their memory")
        inputs = {}
        for name, known in engine.shapes.items():
            shape = self.shapes.get(name, known)
            if None in shape:
                return engine.fail(f"no shape of {name}")
            inputs[name] = self._array(name, shape)
        results = engine.session.run(None, inputs)
        for info, result in zip(engine.session.get_outputs(), results, strict=True):
            self._array(info.name, result.shape)[...] = result
        engine.runs += 1
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = _TYPES[self.engine.types[name]]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


class Engine:
    def __init__(self, plan: bytes, about: dict[str, str], logger: Any) -> None:
        self._logger, self.runs, self.contexts = logger, 0, 0
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3  # it warns that nothing is updated in place here
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(plan, settings, providers=providers)
        infos = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.types = {info.name: info.type for info in infos}
        self.names = set(self.types)
        self.shapes = {
            info.name: tuple(axis if isinstance(axis, int) else None for axis in info.shape)
            for info in self.session.get_inputs()
        }
        self.profiles = json.loads(about["profiles"])
        nodes = onnx.load_from_string(plan).graph.node
        self.pairs = {n.output[0]: n.input[0] for n in nodes if n.op_type == "TensorScatter"}

    def fail(self, message: str) -> bool:
        error(self._logger, message)
        return False

    def create_runtime_config(self) -> "RuntimeConfig":
        return RuntimeConfig()

    def create_execution_context(self, runtime_config: "RuntimeConfig") -> Context:
        self.contexts += 1
        return Context(self)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 2 * SCRATCH


class RuntimeCache:
    def serialize(self) -> bytes | None:
        return b"kernels"

    def deserialize(self, blob: bytes) -> bool:
        return blob == b"kernels"


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self) -> None:
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def get_runtime_cache(self) -> RuntimeCache | None:
        return self.cache


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        try:
            props = onnx.load_from_string(serialized_engine).metadata_props
            about = {prop.key: prop.value for prop in props}
        except Exception:
            about = {}
        if about.get("device") == DEVICE:
            return Engine(serialized_engine, about, self._logger)
        error(self._logger, "the plan is damaged or of another device")
        return None


def machine(monkeypatch: pytest.MonkeyPatch, version: str = RTX) -> Module:
    """Make this a machine with a GPU and bindings of ``version``, as far as fastgen sees."""
    module = Module(version, sys.modules[__name__])

    def choose(options: Any, device: torch.device, dtype: torch.dtype) -> Any:
        return replace(tensorrt_target("float32", options.backend), device="cpu", captured=False)

    monkeypatch.setattr(tensorrt_build, "load", lambda flavour: module)
    logger = tensorrt_build.make_logger.__wrapped__(module)
    monkeypatch.setattr(tensorrt_build, "make_logger", lambda trt: logger)
    monkeypatch.setattr(tensorrt, "ALIGNMENT", 1)  # the CPU's memory is aligned less
    monkeypatch.setattr(tensorrt, "_scratches", {})
    monkeypatch.setattr(building, "choose_target", choose)
    monkeypatch.setattr(cuda, "on_engine_stream", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    stream = SimpleNamespace(cuda_stream=1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    gpu(monkeypatch)
    return module


def gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (8, 9),
    name: str = "NVIDIA L4",
    processors: int = 58,
) -> None:
    """The GPU of this machine, as torch describes it."""
    major, minor = capability
    found = SimpleNamespace(major=major, minor=minor, name=name, multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: found)
