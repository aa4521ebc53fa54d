"""The Engine protocol, and the choice of an engine for a device and dtype."""

from collections.abc import Mapping
from typing import Protocol

import torch

from fastgen.errors import FastgenError
from fastgen.options import EngineOptions
from fastgen.target import Target, onnxruntime_cpu, onnxruntime_cuda


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


class NoEngine(FastgenError):
    """No engine serves this device and dtype; the message says why."""


class NotFused(FastgenError):
    """The fused kernels do not serve this model or size; the decoder engine must."""


def choose_target(options: EngineOptions, device: torch.device, dtype: torch.dtype) -> Target:
    """The Target that serves a model on ``device`` in ``dtype``.

    Raises:
        NoEngine: none does; the reason is what ``model.explain()`` shows.
    """
    name = str(dtype).removeprefix("torch.")
    if options.backend == "torch":
        raise NoEngine("EngineOptions(backend='torch') switches engines off")
    if device.type == "cpu":
        if name != "float32":
            raise NoEngine(f"on the CPU the engine computes in float32, the model is in {name}")
        return onnxruntime_cpu()
    if device.type == "cuda":
        if name not in ("float32", "float16", "bfloat16"):
            raise NoEngine(
                f"no engine computes in {name}: float32, float16 and bfloat16 are served"
            )
        return onnxruntime_cuda(name)
    raise NoEngine(f"no engine runs on device {device.type!r}: cpu and cuda are served")
