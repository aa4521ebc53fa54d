"""What compiles Graphs and runs them: protocols here, a library that serves them in each file."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from fastgen.engine_cache import Artifact
from fastgen.errors import EngineError, FastgenError
from fastgen.graphs.graph import Graph
from fastgen.options import EngineOptions
from fastgen.target import Target

TENSORRT = ("tensorrt", "tensorrt-rtx")


class Binding(Protocol):
    """A graph with all its tensors bound: running it allocates nothing and looks nothing up."""

    def run(self) -> None:
        """Queue the computation on torch's current stream; outputs land in the bound tensors."""


class Engine(Protocol):
    """A compiled graph whose weights are the model's own parameters, by pointer."""

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> Binding:
        """Bind every input and output by name; a tensor bound as both is updated in place."""

    def weight_pointers(self) -> dict[str, int]:
        """Address of each parameter as the engine reads it."""


class Backend(Protocol):
    """A library that compiles Graphs for a Target and runs them."""

    def check(self, device: torch.device) -> None:
        """Find out whether it runs on ``device``.

        Raises:
            MissingRuntimeError: it is not installed as it should be; the message holds the one
                command that mends it.
            NoEngine: it does not serve this GPU.
        """

    def key(self, target: Target, options: EngineOptions, device: torch.device) -> dict[str, Any]:
        """Everything besides the Graph that changes what ``compile`` gives: JSON-able."""

    def compile(
        self, graph: Graph, title: str, options: EngineOptions, device: torch.device
    ) -> Artifact:
        """Compile a Graph for the GPU or CPU ``device``; no weight is in the artifact."""

    def load(
        self,
        artifact: Artifact,
        target: Target,
        parameters: Mapping[str, torch.Tensor],
        options: EngineOptions,
    ) -> Engine:
        """An engine over the model's own parameters, which stay alive and in place.

        Raises:
            Unloadable: the library refuses the artifact.
        """


class NoEngine(FastgenError):
    """No engine serves this device and dtype; the message says why."""


class Unloadable(EngineError):
    """A library refuses what it compiled, though that is whole: another driver may be the cause.
    It is compiled again, once."""


class NotFused(FastgenError):
    """The fused kernels do not serve this model or size; the decoder engine must."""


def too_large(options: EngineOptions, batch: int, sources: int) -> str | None:
    """Why a call of ``batch`` rows of ``sources`` tokens exceeds what engines are compiled for."""
    if options.backend not in TENSORRT:
        return None  # the others serve every size
    if batch > options.max_batch:
        return f"{batch} rows are more than EngineOptions(max_batch={options.max_batch})"
    if sources > options.max_source_tokens:
        allowed = f"EngineOptions(max_source_tokens={options.max_source_tokens})"
        return f"{sources} source tokens are more than {allowed}"
    return None
