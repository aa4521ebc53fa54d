"""What the two sides of a model share: functions captured as CUDA graphs, and how many are kept."""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from fastgen import cuda, cuda_graph
from fastgen.engines import TENSORRT
from fastgen.options import EngineOptions
from fastgen.target import Target

CAPTURED_TOKENS = 2048
"""Source tokens of all rows up to which graphs wait for their launches, not for their products."""


@contextmanager
def lasting() -> Iterator[None]:
    """What is made in the body outlives the call: ``torch.inference_mode()`` must not mark it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Capturing:
    """Base of what runs engines over buffers that stay in place."""

    def __init__(self, target: Target, device: torch.device, options: EngineOptions) -> None:
        self.target, self.device, self.options = target, device, options
        self._graph_pool: cuda_graph.GraphPool | None = None

    @property
    def captures(self) -> bool:
        """Whether what runs often is replayed as CUDA graphs."""
        return self.target.captured and self.options.cuda_graphs and cuda.missing() is None

    def captures_sources(self, batch: int, sources: int) -> bool:
        """Whether what reads so many source tokens is captured."""
        return self.captures and batch * sources <= CAPTURED_TOKENS

    def stream(self) -> AbstractContextManager[None]:
        """Run the body on the engine's stream, ordered with the caller's."""
        return cuda.on_engine_stream(self.device) if self.device.type == "cuda" else nullcontext()

    def hand_over(self, *tensors: torch.Tensor) -> None:
        """Say that whose turn it is will use tensors made in it, on the caller's stream."""
        cuda.hand_over(self.device, tensors)

    def sources_for(self, sources: int) -> int:
        """Source tokens of a buffer: exact on the CPU; four sizes per doubling on a GPU, so that
        one captured graph serves many lengths and at most a fifth of what is read is padding."""
        if self.target.device == "cpu":
            return sources
        step = 32
        while sources > 8 * step:
            step *= 2
        padded = -(-sources // step) * step
        if self.target.backend in TENSORRT:  # whose plans end there
            return max(sources, min(padded, self.options.max_source_tokens))
        return padded

    def _captured(
        self, function: Callable[[], None], mutable: Sequence[torch.Tensor] = ()
    ) -> Callable[[], None]:
        """``function``, as the replay of a graph on a GPU; ``mutable`` is what it changes.

        Where other threads keep on breaking the capture, its kernels are launched one by one.
        """
        if not self.captures:
            return function
        if self._graph_pool is None:
            self._graph_pool = cuda_graph.GraphPool(self.device)
        undo = cuda_graph.restorer(list(mutable), self.device)
        try:
            return cuda_graph.CapturedGraph(function, self.device, undo, self._graph_pool).replay
        except cuda_graph.CaptureBroken:
            return function

    def _once(
        self, made: dict[Any, Any], key: Hashable, make: Callable[[], Any], limit: float
    ) -> Any:
        """What ``make`` made under this key; past ``limit`` the least recently used is dropped."""
        value = made.pop(key, None)
        if value is None:
            with lasting():
                value = make()
        made[key] = value
        while len(made) > limit:
            del made[next(iter(made))]
        return value


def source_mask(mask: torch.Tensor | None) -> torch.Tensor | int:
    """What ``SourceBuffers.fill`` takes; as in transformers, a fraction hides nothing."""
    if mask is None:
        return 1
    return mask != 0 if mask.is_floating_point() else mask


class SourceBuffers:
    """A padded copy of what the source side of a model reads, at one address for all calls."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        """
        Args:
            tensors: one of [B, S, ...] for each input, by its name in the graph.
        """
        self.tensors = tensors

    def fill(self, sources: int, **values: torch.Tensor | int) -> None:
        """Copy in values of ``sources`` tokens, or one for all of them; zeros behind them."""
        for name, value in values.items():
            tensor = self.tensors[name]
            if tensor.shape[1] > sources:
                tensor[:, sources:].zero_()
                tensor = tensor[:, :sources]
            if isinstance(value, torch.Tensor):
                tensor.copy_(value)
            else:
                tensor.fill_(value)


_idle_flags: dict[tuple[torch.device, int], list[torch.Tensor]] = {}


def host_flags(owner: Any, count: int, device: torch.device) -> torch.Tensor:
    """Bool [count] that the GPU writes and the host reads; ``owner``'s for as long as it lives.

    Pinned memory is kept for the next owner. Given back to torch it would be followed by an event
    on the engine stream, in whatever thread, and that would be part of a capture.
    """
    if device.type != "cuda":
        return torch.ones(count, dtype=torch.bool)
    idle = _idle_flags.setdefault((device, count), [])
    try:
        flags = idle.pop()
    except IndexError:
        flags = torch.ones(count, dtype=torch.bool, pin_memory=True)
    weakref.finalize(owner, idle.append, flags).atexit = False
    return flags
