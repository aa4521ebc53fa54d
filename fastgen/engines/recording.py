"""A Backend that keeps the Graphs it is asked to compile: a model's graphs, on any machine.

Used in place of ``engines.choice.backend`` by tests and by ``benchmarks/tensorrt_check.py``.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fastgen.engine_cache import Artifact
from fastgen.errors import EngineError
from fastgen.graphs.graph import Graph
from fastgen.options import EngineOptions
from fastgen.target import Target


class Recorder:
    """Keeps Graphs by name in ``graphs``; its engines do not run."""

    def __init__(self) -> None:
        self.graphs: dict[str, Graph] = {}

    def check(self, device: torch.device) -> None:
        pass

    def key(self, target: Target, options: EngineOptions, device: torch.device) -> dict[str, Any]:
        return {}

    def compile(
        self, graph: Graph, title: str, options: EngineOptions, device: torch.device
    ) -> Artifact:
        self.graphs[title] = graph
        return Artifact(b"", graph.meta())

    def load(
        self,
        artifact: Artifact,
        target: Target,
        parameters: Mapping[str, torch.Tensor],
        options: EngineOptions,
    ) -> "RecordedEngine":
        return RecordedEngine()


class RecordedEngine:
    """An engine of a recorded Graph, which cannot run."""

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        raise EngineError("a recorded graph does not run")

    def weight_pointers(self) -> dict[str, int]:
        return {}
