"""The ONNX Runtime engine: CPU and CUDA execution providers, IO binding, weights by pointer."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch

from fastgen import cuda, processes, runtime
from fastgen.blockwise import is_made
from fastgen.engine_cache import Artifact
from fastgen.engines import onnxruntime_tensorrt
from fastgen.engines.weight_inputs import weights_as_inputs
from fastgen.errors import EngineError, MissingRuntimeError
from fastgen.file_pages import FilePages, unwritten
from fastgen.graphs.graph import Graph
from fastgen.graphs.shape import LAST_STATE
from fastgen.options import EngineOptions
from fastgen.target import Target

_SPIN_US = "50"  # longer than the operators of a step keep a thread waiting


class OnnxRuntime:
    """ONNX Runtime, with its TensorRT provider or without (see ``Backend``)."""

    def __init__(self, name: str) -> None:
        self._tensorrt = name == onnxruntime_tensorrt.NAME

    def check(self, device: torch.device) -> None:
        runtime.onnxruntime()
        if self._tensorrt:
            onnxruntime_tensorrt.check()
        elif device.type == "cuda" and (problem := runtime.cuda_build_problem()):
            raise MissingRuntimeError(problem)

    def key(self, target: Target, options: EngineOptions, device: torch.device) -> dict[str, Any]:
        generation = ""
        if device.type == "cuda":
            generation = "sm{}{}".format(*torch.cuda.get_device_capability(device))
        return {"version": runtime.onnxruntime().__version__, "gpu": generation}

    def compile(
        self, graph: Graph, title: str, options: EngineOptions, device: torch.device
    ) -> Artifact:
        """The graph itself: a session is made of it in milliseconds."""
        return Artifact(graph.onnx, graph.meta())

    def load(
        self,
        artifact: Artifact,
        target: Target,
        parameters: Mapping[str, torch.Tensor],
        options: EngineOptions,
    ) -> "OnnxRuntimeEngine":
        graph = Graph.from_meta(artifact.data, artifact.meta)
        return OnnxRuntimeEngine(graph, target, parameters, options)


class OnnxRuntimeEngine:
    """One InferenceSession whose initializers are torch parameters."""

    def __init__(
        self,
        graph: Graph,
        target: Target,
        parameters: Mapping[str, torch.Tensor],
        options: EngineOptions,
    ) -> None:
        """Create the session.

        Args:
            parameters: the model's parameters by name; those the graph names must be contiguous
                and must stay alive and in place as long as the engine.
        """
        ort = runtime.onnxruntime()
        self.graph = graph
        self.target = target
        self._device = next(iter(parameters.values())).device
        self._weights = {
            name: ort.OrtValue.from_dlpack(parameters[name].detach()) for name in graph.parameters
        }
        constants = _constants(graph, target, parameters, options)
        packs = target.device == "cpu"
        self.copied = tuple(n for n in constants if packs and self._weights[n].shape()[1:])
        """What the session may hold a second time, packed: of the graph's parameters, those that
        are no vectors."""
        settings = _session_options(target, options)
        for name in constants:
            settings.add_initializer(name, self._weights[name])
        self._inputs = {n: value for n, value in self._weights.items() if n not in constants}
        data = weights_as_inputs(graph, but=constants) if self._inputs else graph.onnx
        providers = _providers(target, self._device, options)

        def compile_graph() -> Any:
            return ort.InferenceSession(data, settings, providers=providers)

        read_once = (parameters[name].detach() for name in self.copied if not is_made(name))
        from_file = FilePages(unwritten(read_once))
        with from_file.given_back_meanwhile(), cuda.exclusive(self._device):
            # a session that is made works on the engine stream
            self._session = _on_device(compile_graph, self._device)
        processes.never_destroy_in_children(self._session)
        for name in filter(is_made, self.copied):  # what was made for the session alone
            del self._weights[name]
        self._run_options = None  # looking into it costs ONNX Runtime 0.1 ms
        if target.device == "cuda":
            self._run_options = ort.RunOptions()
            # torch's stream order is enough: nothing waits for the GPU after a run
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> "OnnxRuntimeBinding":
        """Bind contiguous tensors of the graph's device by pointer (see ``Engine.bind``)."""
        ort = runtime.onnxruntime()
        binding = self._session.io_binding()
        for name, value in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        for spec in self.graph.inputs:
            binding.bind_ortvalue_input(spec.name, ort.OrtValue.from_dlpack(tensors[spec.name]))
        for spec in self.graph.outputs:
            binding.bind_ortvalue_output(spec.name, ort.OrtValue.from_dlpack(tensors[spec.name]))
        return OnnxRuntimeBinding(self, binding, dict(tensors))

    def partition(self) -> dict[str, dict[str, int]]:
        """How many operators of each kind each execution provider runs: of the TensorRT provider's
        graphs, which it divides."""
        return onnxruntime_tensorrt.partition(self._session)

    def weight_pointers(self) -> dict[str, int]:
        return {name: value.data_ptr() for name, value in self._weights.items()}

    def __del__(self) -> None:
        # it waits for the GPU as it ends; with the interpreter, modules may have gone before it
        if "_session" in vars(self) and cuda:
            cuda.dispose(self._device, [vars(self).pop("_session")])

    def run(self, io_binding: Any) -> None:
        """Run a bound session; a failed allocation becomes torch's out-of-memory error."""

        def launch() -> None:
            self._session.run_with_iobinding(io_binding, self._run_options)

        if self.target.device == "cuda":
            with cuda.on_engine_stream(self._device):
                _with_memory(launch, self._device)
        else:
            _with_memory(launch, self._device)


class OnnxRuntimeBinding:
    """A session with every tensor bound."""

    def __init__(
        self, engine: OnnxRuntimeEngine, io_binding: Any, tensors: dict[str, torch.Tensor]
    ) -> None:
        self._engine = engine
        self._io_binding = io_binding
        self._tensors = tensors  # ONNX Runtime holds only pointers to them

    def run(self) -> None:
        self._engine.run(self._io_binding)


def _constants(
    graph: Graph,
    target: Target,
    parameters: Mapping[str, torch.Tensor],
    options: EngineOptions,
) -> tuple[str, ...]:
    """The parameters that a session knows when it is made; the others it gets with every run."""
    if target.backend == onnxruntime_tensorrt.NAME:  # it would copy them into its engines
        return ()
    if target.device == "cpu":  # it holds those of matrix products a second time, prepacked
        made = filter(is_made, graph.parameters)  # not constant, they would be read slowly
        # vectors, which no kernel packs: to look at an input takes longer than to add it
        vectors = (n for n in graph.parameters if not is_made(n) and parameters[n].ndim < 2)
        packed = _prepacked(graph, parameters, options.prepack)
        return tuple(dict.fromkeys((*packed, *made, *vectors)))
    return graph.parameters


def _prepacked(
    graph: Graph, parameters: Mapping[str, torch.Tensor], share: float
) -> tuple[str, ...]:
    """The matrices to pack. Those in pages of a file, which are given back for it; of the others
    within ``share`` of all parameters' bytes, of the graph that runs once a token, those of short
    rows first, which unpacked are read slowest. With 1, all of all; with 0, none."""
    if share == 1:
        return tuple(name for name in graph.parameters if not is_made(name))
    outputs = {spec.name for spec in graph.outputs}
    further = LAST_STATE in outputs and len(outputs) > 1  # with hidden states, or without the head
    if share == 0 or further:
        return ()
    nodes = onnx.load_from_string(graph.onnx).graph.node
    matrices = {n.input[1] for n in nodes if n.op_type == "FusedMatMul"}.intersection(parameters)
    free = {tensor.data_ptr() for tensor in unwritten(parameters[n].detach() for n in matrices)}
    packed = sorted(name for name in matrices if parameters[name].data_ptr() in free)
    if "logits" not in outputs:
        return tuple(packed)
    matrices.difference_update(packed)
    unique = {p.data_ptr(): 4 * p.numel() for p in parameters.values()}  # as they are computed with
    left = share * sum(unique.values())
    for name in sorted(matrices, key=lambda n: (parameters[n].shape[1], parameters[n].nbytes, n)):
        left -= parameters[name].nbytes
        if left < 0:
            break
        packed.append(name)
    return tuple(packed)


def _session_options(target: Target, options: EngineOptions) -> Any:
    ort = runtime.onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # of what fails, the exception tells
    # Graphs are authored with fused operators: there is nothing left to optimize at load
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if target.backend == onnxruntime_tensorrt.NAME:
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    settings.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.path.dirname(os.devnull)
    )
    if target.device == "cpu":
        settings.intra_op_num_threads = options.intra_op_threads or processes.threads()
        # Between two runs its threads must not spin on the cores that torch's threads need; within
        # one, not for long on those that another program needs, or one of their own number
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        settings.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    return settings


def _providers(target: Target, device: torch.device, options: EngineOptions) -> list[Any]:
    """Execution providers, the preferred first: names, or pairs of name and options."""
    if target.device == "cpu":
        return ["CPUExecutionProvider"]
    settings = {
        "user_compute_stream": str(cuda.engine_stream(device).cuda_stream),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": str(int(torch.backends.cuda.matmul.allow_tf32)),
    }
    if (
        device.index
    ):  # the default 0 must not be named: ONNX Runtime would warn that no plugin has it
        settings["device_id"] = str(device.index)
    cuda_provider = ("CUDAExecutionProvider", settings)
    if target.backend == onnxruntime_tensorrt.NAME:
        return [onnxruntime_tensorrt.provider(target, device, options), cuda_provider]
    return [cuda_provider]


def _on_device(compile_graph: Callable[[], Any], device: torch.device) -> Any:
    """A session; an error with the remedy where one on the GPU lacks libraries it needs, and
    ONNX Runtime would have gone on without them on the CPU."""
    session = failure = None
    try:
        session = _with_memory(compile_graph, device)
    except EngineError as error:
        failure = error
    lost = session is None or "CUDAExecutionProvider" not in session.get_providers()
    if device.type == "cuda" and lost and (problem := runtime.cuda_provider_problem()):
        raise MissingRuntimeError(problem) from failure
    if failure is not None:
        raise failure
    return session


def _with_memory(action: Callable[[], Any], device: torch.device) -> Any:
    """Do what needs memory beside torch's; once more without what torch keeps but does not use."""
    try:
        return action()
    except Exception as error:
        failure = _translated(error, device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not isinstance(failure, torch.OutOfMemoryError) or capturing:
            raise failure from error
    torch.cuda.empty_cache()
    try:
        return action()
    except Exception as error:
        raise _translated(error, device) from error


def _translated(error: Exception, device: torch.device) -> Exception:
    """What a failure of ONNX Runtime means to a torch program."""
    text = str(error)
    requested = re.search(r"(?:requested buffer of size|bytes requested:?)\s*(\d+)", text)
    words = ("out of memory", "resource allocation failed", "alloc_failed")
    if requested is None and not any(word in text.lower() for word in words):
        return EngineError(f"ONNX Runtime failed on {device.type}: {text}")
    size = f"{int(requested[1]) / 2**20:.2f} MiB" if requested else "memory"
    if device.type != "cuda":
        return MemoryError(f"ONNX Runtime could not allocate {size}.")
    free, total = torch.cuda.mem_get_info(device)
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {size}. GPU {device.index or 0} has a total "
        f"capacity of {total / 2**30:.2f} GiB of which {free / 2**30:.2f} GiB is free. torch has "
        f"{torch.cuda.memory_allocated(device) / 2**30:.2f} GiB allocated. The model is still "
        "usable: call it with a smaller batch, fewer beams or a shorter input."
    )
