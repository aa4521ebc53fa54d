"""CUDA streams and graphs: the engine's stream, and one captured graph per bucket."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.errors import FastgenError

# One thread at a time uses an engine stream: what another launched on it while a graph is being
# captured would become part of that graph.
_lock = threading.RLock()


@cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def engine_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's engines run (ONNX Runtime refuses the default stream)."""
    with _lock:
        return _stream(torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def on_engine_stream(device: torch.device) -> Iterator[None]:
    """Make the engine stream current, ordered after and before the caller's current stream."""
    with _lock:
        stream, caller = engine_stream(device), torch.cuda.current_stream(device)
        if stream == caller:
            yield
            return
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            caller.wait_stream(stream)


class NotCapturable(FastgenError):
    """A function asks the GPU for a value, which a graph cannot hold."""


class RefuseWaits(TorchDispatchMode):
    """Finds out, in this thread only, whether torch code would wait for a value of the GPU.

    That breaks a capture, and a broken capture cannot be mended: so it is looked at before.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in _WAITING:
            raise NotCapturable(f"torch.{name} gives the host a value of the GPU")
        return function(*args, **(kwargs or {}))


# What .item(), bool(), boolean indexing and unique() come down to
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")


class GraphPool:
    """Scratch memory that captured graphs share, since they run one after the other.

    Given back with the last of the pool's graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        # torch frees a pool for good with its last graph: an empty one keeps it
        with on_engine_stream(device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*graph is empty")
            self._keeper = torch.cuda.CUDAGraph()
            self._keeper.capture_begin(pool=self.handle, capture_error_mode="thread_local")
            self._keeper.capture_end()


class CapturedGraph:
    """A function's kernels as one CUDA graph."""

    def __init__(
        self,
        function: Callable[[], None],
        device: torch.device,
        undo: Callable[[], None],
        pool: GraphPool,
    ) -> None:
        """Run ``function`` twice to allocate and tune, then capture it on the engine stream.

        ``undo()`` follows each of the three: so the function may change its own inputs.

        Raises:
            NotCapturable: the function waits for the GPU; nothing was captured or changed.
        """
        self._device, self._pool = device, pool
        self._function = function  # and with it the memory that its kernels use
        with on_engine_stream(device):
            function()
            undo()
            try:
                with RefuseWaits():
                    function()
            finally:
                undo()
            torch.cuda.current_stream(device).synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # "thread_local": an allocation on another thread must not break this capture
            self._graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            try:
                function()
            finally:
                self._graph.capture_end()
            undo()

    def replay(self) -> None:
        """Queue all kernels, in the order of torch's current stream.

        They run on the engine stream: the graph's scratch memory is the engine's own.
        """
        with on_engine_stream(self._device):
            self._graph.replay()


def restorer(tensors: list[torch.Tensor], device: torch.device) -> Callable[[], None]:
    """A function that puts these tensors and the random number generator back as they are now."""
    random_state = torch.cuda.get_rng_state(device)
    with on_engine_stream(device):
        copies = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        with on_engine_stream(device):
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)
        torch.cuda.set_rng_state(random_state, device)

    return restore
