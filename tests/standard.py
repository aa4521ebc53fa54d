"""The graphs that TensorRT gets, run on this CPU: by ONNX Runtime, or by onnx's own evaluator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from ml_dtypes import bfloat16
from onnx.reference import ReferenceEvaluator

from fastgen.engine_cache import Artifact
from fastgen.engines.weight_inputs import weights_as_inputs
from fastgen.graphs.graph import Graph
from fastgen.target import Target, tensorrt


def cpu_target(dtype: str) -> Target:
    """TensorRT's Target, but for who runs it: bfloat16 has no kernels in ONNX Runtime's CPU
    provider."""
    backend = "onnx reference" if dtype == "bfloat16" else "onnxruntime"
    return replace(tensorrt(dtype), device="cpu", backend=backend, captured=False)


class Reference:
    """onnx's reference evaluator as a Backend: it defines what operators compute, in any dtype."""

    def check(self, device: torch.device) -> None: ...

    def key(self, *_: Any) -> dict[str, Any]:
        return {"version": onnx.__version__}

    def compile(self, graph: Graph, *_: Any) -> Artifact:
        return Artifact(graph.onnx, graph.meta())

    def load(
        self, artifact: Artifact, target: Target, parameters: Mapping[str, torch.Tensor], *_: Any
    ) -> "ReferenceEngine":
        return ReferenceEngine(Graph.from_meta(artifact.data, artifact.meta), parameters)


class ReferenceEngine:
    def __init__(self, graph: Graph, parameters: Mapping[str, torch.Tensor]) -> None:
        self.graph = graph
        self.weights = {name: parameters[name].detach() for name in graph.parameters}
        self.evaluator = ReferenceEvaluator(onnx.load_from_string(weights_as_inputs(graph)))

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> "ReferenceBinding":
        return ReferenceBinding(lambda: self._run(tensors))

    def weight_pointers(self) -> dict[str, int]:
        return {name: weight.data_ptr() for name, weight in self.weights.items()}

    def _run(self, tensors: Mapping[str, torch.Tensor]) -> None:
        inputs = {spec.name: tensors[spec.name] for spec in self.graph.inputs}
        feeds = {name: _array(tensor) for name, tensor in (self.weights | inputs).items()}
        for spec, found in zip(self.graph.outputs, self.evaluator.run(None, feeds), strict=True):
            assert found.dtype == _array(tensors[spec.name]).dtype, spec.name
            tensors[spec.name].copy_(torch.from_numpy(found.astype(np.float32)))


@dataclass(frozen=True)
class ReferenceBinding:
    run: Callable[[], None]


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # numpy knows it by ml_dtypes only
        return tensor.contiguous().view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()
