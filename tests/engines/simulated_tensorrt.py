"""A stand-in for the runtime half of TensorRT, which computes by ONNX Runtime on the CPU.

It has the calls that ``fastgen/engines/tensorrt.py`` makes, and refuses what the documents of
TensorRT forbid: unset shapes or addresses, sizes outside of the profile, too little scratch
memory, and an updated buffer whose output has another address. "Plans" are ONNX bytes.
"""

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

SCRATCH = 4096  # bytes that every context asks for


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = (
        SimpleNamespace(name=name) for name in ("INTERNAL_ERROR", "ERROR", "WARNING")
    )

    def __init__(self) -> None:
        pass


class Context:
    def __init__(self, engine: "Engine") -> None:
        self.engine, self.active_optimization_profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile = index
        self.shapes = {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        known = self.engine.shapes[name]
        fits = len(known) == len(shape) and all(
            axis in (None, size) for axis, size in zip(known, shape, strict=True)
        )
        if fits:
            self.shapes[name] = shape
        return fits or self.engine.fail(f"{name} is {shape}, not {known}")

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names or self.engine.fail(f"{name} is no tensor")

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = size if address else 0

    def execute_async_v3(self, stream: int) -> bool:
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
        dtype = {"tensor(float)": np.float32, "tensor(int64)": np.int64}[self.engine.types[name]]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


class Engine:
    def __init__(self, plan: bytes, logger: Any) -> None:
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
        nodes = onnx.load_from_string(plan).graph.node
        self.pairs = {n.output[0]: n.input[0] for n in nodes if n.op_type == "TensorScatter"}

    def fail(self, message: str) -> bool:
        self._logger.log(ILogger.ERROR, message)
        return False

    def create_runtime_config(self) -> SimpleNamespace:
        cache = SimpleNamespace(serialize=lambda: b"kernels", deserialize=lambda data: True)
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda cache: True,
            get_runtime_cache=lambda: cache,
        )

    def create_execution_context(self, config: SimpleNamespace) -> Context:
        self.contexts += 1
        return Context(self)


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if plan:
            return Engine(plan, self._logger)
        self._logger.log(ILogger.ERROR, "the plan is empty")
        return None


MODULE = SimpleNamespace(
    __version__="1.7.1",
    ILogger=ILogger,
    Runtime=Runtime,
    ComputeCapability=SimpleNamespace(SM89=1),
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(LAZY=0, EAGER=1),
)
