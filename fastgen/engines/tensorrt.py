"""The TensorRT engine: plans run over torch's memory, the model's own weights among it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from fastgen import cuda
from fastgen.engine_cache import Artifact, EngineCache
from fastgen.engines import NoEngine, Unloadable, tensorrt_build, weight_inputs
from fastgen.engines.side_file import SideFile, gpu_model
from fastgen.engines.tensorrt_build import FLAVOURS, Build, Flavour, Profile
from fastgen.engines.weight_inputs import in_place
from fastgen.errors import EngineError
from fastgen.graphs.graph import Graph, TensorSpec
from fastgen.options import EngineOptions
from fastgen.target import Target

ALIGNMENT = 256  # bytes, of every address that TensorRT is given


class TensorRT:
    """TensorRT or TensorRT for RTX (see ``Backend``)."""

    def __init__(self, name: str) -> None:
        self.flavour: Flavour = FLAVOURS[name]

    def check(self, device: torch.device) -> None:
        trt = tensorrt_build.load(self.flavour)
        major, minor = torch.cuda.get_device_capability(device)
        if self.flavour.names_gpu and not hasattr(trt.ComputeCapability, f"SM{major}{minor}"):
            raise NoEngine(
                f"{self.flavour.name} {trt.__version__} does not run on compute capability "
                f"{major}.{minor}: use EngineOptions(backend='tensorrt') or 'onnxruntime'"
            )

    def key(self, target: Target, options: EngineOptions, device: torch.device) -> dict[str, Any]:
        build = self._build(options, device)
        files = tensorrt_build.__file__, weight_inputs.__file__
        sources = [Path(str(file)).read_bytes() for file in files]
        names = ("max_batch", "max_source_tokens", "build_level", "build_memory_mb")
        return {
            "version": tensorrt_build.load(self.flavour).__version__,
            "gpu": "sm{}{}".format(*build.capability)
            if self.flavour.names_gpu
            else gpu_model(device),
            "tf32": build.tf32,
            "builder": hashlib.sha256(b"\0".join(sources)).hexdigest(),
            **{name: getattr(options, name) for name in names},
        }

    def compile(
        self, graph: Graph, title: str, options: EngineOptions, device: torch.device
    ) -> Artifact:
        build = self._build(options, device)
        side = self._side_file(options, device, "timings")
        with torch.cuda.device(device):  # on which TensorRT times its kernels
            plan, timings = tensorrt_build.build_plan(graph, build, title, side.read())
        if timings:
            side.write(timings)
        ranges = [
            {axis: list(r) for axis, r in p.items()}
            for p in tensorrt_build.profiles(graph, options)
        ]
        meta = {**graph.meta(), "in_place": in_place(graph), "profiles": ranges}
        return Artifact(plan, meta)

    def load(
        self,
        artifact: Artifact,
        target: Target,
        parameters: Mapping[str, torch.Tensor],
        options: EngineOptions,
    ) -> "TensorRTEngine":
        device = next(iter(parameters.values())).device
        kernels = self._side_file(options, device, "kernels")
        return TensorRTEngine(self.flavour, artifact, parameters, kernels)

    def _build(self, options: EngineOptions, device: torch.device) -> Build:
        capability = torch.cuda.get_device_capability(device)
        return Build(self.flavour, capability, options, torch.backends.cuda.matmul.allow_tf32)

    def _side_file(self, options: EngineOptions, device: torch.device, kind: str) -> SideFile:
        """What builds or runs leave for the next ones, for this version and model of GPU."""
        version = tensorrt_build.load(self.flavour).__version__
        folder = EngineCache(options.cache_dir).folder if options.disk_cache else None
        return SideFile(folder, f"{self.flavour.name}-{version}-{gpu_model(device)}.{kind}")


class TensorRTEngine:
    """A deserialized plan, whose weights are inputs bound to torch parameters."""

    def __init__(
        self,
        flavour: Flavour,
        artifact: Artifact,
        parameters: Mapping[str, torch.Tensor],
        kernels: SideFile,
    ) -> None:
        """Load a plan.

        Args:
            parameters: the model's parameters by name; those the graph names must be contiguous
                and must stay alive and in place as long as the engine.
            kernels: keeps what a flavour compiles when it runs.

        Raises:
            Unloadable: TensorRT refuses the plan.
            EngineError: it fails in another way.
        """
        self.graph = Graph.from_meta(b"", artifact.meta)
        self._trt = tensorrt_build.load(flavour)
        self._logger = tensorrt_build.make_logger(self._trt)
        self._flavour, self._kernels = flavour, kernels
        self._profiles: list[Profile] = [
            {axis: tensorrt_build.Range(*r) for axis, r in profile.items()}
            for profile in artifact.meta["profiles"]
        ]
        self._captured = bool(artifact.meta["in_place"])  # a decoder: its steps become CUDA graphs
        self._weights = {name: parameters[name].detach() for name in self.graph.parameters}
        for name, weight in self._weights.items():
            if weight.data_ptr() % ALIGNMENT:
                raise NoEngine(
                    f"parameter {name} does not begin at a multiple of {ALIGNMENT} bytes"
                )
        self.device = next(iter(self._weights.values())).device
        self._idle: list[Any] = []
        self._seen: set[Any] = set()
        with cuda.exclusive(self.device), torch.cuda.device(self.device):
            make = self._trt.Runtime
            self._runtime = tensorrt_build.made(self._trt, self._logger, make, self._logger)
            self._logger.take()
            self._engine = self._runtime.deserialize_cuda_engine(artifact.data)
            if self._engine is None:
                raise Unloadable(
                    f"TensorRT {self._trt.__version__} refuses a plan: {self._logger.take()}. "
                    "If it has just built it, use EngineOptions(backend='onnxruntime')"
                )
            self._runtime_config = self._make_runtime_config()

    def weight_pointers(self) -> dict[str, int]:
        return {name: weight.data_ptr() for name, weight in self._weights.items()}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> "TensorRTBinding":
        """Bind contiguous tensors of the engine's device by pointer (see ``Engine.bind``).

        Raises:
            EngineError: a size is outside of every profile; the message names the option.
        """
        with cuda.on_engine_stream(self.device):
            return TensorRTBinding(self, tensors)

    def profile_for(self, sizes: Mapping[str, int]) -> int:
        """The first profile that serves these sizes of the graph's axes."""
        for index, profile in enumerate(self._profiles):
            if all(r.low <= sizes[axis] <= r.high for axis, r in profile.items() if axis in sizes):
                return index
        limits = {axis: r.high for axis, r in self._profiles[-1].items()}
        raise EngineError(
            f"TensorRT: sizes {dict(sizes)} exceed the engine's {limits}. B is bounded by "
            "EngineOptions(max_batch=...), S by max_source_tokens, Q by the KV buffer."
        )

    def take_context(self, profile: int) -> Any:
        """An execution context that nobody uses, set to a profile; its scratch memory is torch's.

        Call it on the engine's stream.
        """
        idle = [c for c in self._idle if c.active_optimization_profile == profile]
        if idle:
            self._idle.remove(idle[-1])
            return idle[-1]
        context = self._checked(self._engine.create_execution_context(self._runtime_config))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._checked(context.set_optimization_profile_async(profile, stream) or None)
        return context

    def scratch_size(self, context: Any) -> int:
        """Bytes of scratch memory for a run over the context's shapes.

        Raises:
            EngineError: TensorRT cannot tell, and said why.
        """
        self._logger.take()
        if size := int(context.update_device_memory_size_for_shapes()):
            return size
        if reason := self._logger.take(default=""):  # 0 means an error, or that nothing is needed
            raise EngineError(f"TensorRT {self._trt.__version__}: {reason}")
        profile = context.active_optimization_profile
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def give_back(self, context: Any) -> None:
        self._idle.append(context)

    def ran(self, shapes: Any) -> None:
        """Note a first run over these shapes: what it compiled is kept for the next process."""
        if self._compiled is not None and shapes not in self._seen:
            self._seen.add(shapes)
            if (compiled := self._compiled.serialize()) is not None:
                self._kernels.write(bytes(compiled))

    def _make_runtime_config(self) -> Any:
        trt, config = self._trt, self._checked(self._engine.create_runtime_config())
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self._compiled = None  # the runtime cache, where there is one
        if self._flavour.compiles_at_run:
            cache = config.create_runtime_cache()
            if cache is not None and (stored := self._kernels.read()):
                cache.deserialize(stored)  # refused for another driver or GPU: then compiled anew
            if cache is not None and config.set_runtime_cache(cache):
                self._compiled = cache
            # A captured graph keeps the kernels of its capture, so they must be the best ones; an
            # encoder meets ever new sizes, for which compiling would cost more than it gains
            kind = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = (
                kind.EAGER if self._captured else kind.LAZY
            )
        return config

    def _checked(self, result: Any) -> Any:
        """``result``, unless it is None: TensorRT's way to fail."""
        if result is None:
            raise EngineError(f"TensorRT {self._trt.__version__}: {self._logger.take()}")
        return result


class TensorRTBinding:
    """A context with every tensor bound; the context is reused after the binding's end."""

    def __init__(self, engine: TensorRTEngine, tensors: Mapping[str, torch.Tensor]) -> None:
        self._engine = engine
        inputs = {spec.name: tensors[spec.name] for spec in engine.graph.inputs}
        outputs = {spec.name: tensors[spec.name] for spec in engine.graph.outputs}
        self._shapes = tuple(tuple(tensor.shape) for tensor in inputs.values())
        profile = engine.profile_for(_sizes(engine.graph.inputs, inputs))
        self._copies = [
            (torch.empty_like(t), t) for t in inputs.values() if t.data_ptr() % ALIGNMENT
        ]
        moved = {id(source): copy for copy, source in self._copies}
        bound = {name: moved.get(id(t), t) for name, t in inputs.items()} | outputs
        for name, tensor in outputs.items():
            if tensor.data_ptr() % ALIGNMENT:
                raise EngineError(f"{name} does not begin at a multiple of {ALIGNMENT} bytes")
        self._tensors = bound, engine._weights  # TensorRT holds only pointers to them
        self._context = context = engine.take_context(profile)
        for name, tensor in inputs.items():
            engine._checked(context.set_input_shape(name, tuple(tensor.shape)) or None)
        for name, tensor in (bound | engine._weights).items():
            engine._checked(context.set_tensor_address(name, tensor.data_ptr()) or None)
        self._scratch = _scratch(engine.device, engine.scratch_size(context))
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())

    def run(self) -> None:
        engine = self._engine
        with cuda.on_engine_stream(engine.device):
            for copy, source in self._copies:
                copy.copy_(source)
            stream = torch.cuda.current_stream(engine.device).cuda_stream
            engine._checked(self._context.execute_async_v3(stream) or None)
        engine.ran(self._shapes)

    def __del__(self) -> None:
        if hasattr(self, "_context"):
            self._engine.give_back(self._context)


def _sizes(specs: tuple[TensorSpec, ...], tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The size of each free axis."""
    return {
        axis: size
        for spec in specs
        for axis, size in zip(spec.shape, tensors[spec.name].shape, strict=True)
        if isinstance(axis, str)
    }


_scratches: WeakValueDictionary[torch.device, torch.Tensor] = WeakValueDictionary()


def _scratch(device: torch.device, size: int) -> torch.Tensor:
    """Scratch memory, uint8 [size or more], that all contexts of a device share: they run one
    after the other on its engine stream. A captured graph keeps the one it was captured with."""
    scratch = _scratches.get(device)
    if scratch is None or scratch.numel() < size:
        scratch = torch.empty(max(size, ALIGNMENT), dtype=torch.uint8, device=device)
        _scratches[device] = scratch
    return scratch
