"""What captures: functions as CUDA graphs on a GPU's engine stream (see ``cuda.py``).

What other threads do meanwhile on streams of their own is not looked at: a relaxed capture forbids
nobody to allocate, free or ask for events, only this thread's allocations go to the graph's pool,
and nothing captured draws random numbers, for which torch would have to hold the generator that all
threads share. One thing no capture survives, a wait for the whole device, which then fails itself:
torch's waits while a graph is captured, and where another library's does not, the capture is tried
again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from fastgen import cuda
from fastgen.capturable import RefuseDraws, RefuseWaits
from fastgen.errors import FastgenError

ATTEMPTS = 3  # captures broken by other threads, before the kernels are launched one by one


class CaptureBroken(FastgenError):
    """What other threads did broke every attempt to capture; the function itself is fine."""


class GraphPool:
    """Scratch memory that captured graphs share, since they run one after the other.

    Given back with the last of the pool's graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._routing = False
        self._key = cuda.gpu_of(device).index, torch.cuda.graph_pool_handle()
        # torch frees a pool with the last that used it: the use counted here ends with this object
        torch._C._cuda_beginAllocateCurrentThreadToPool(*self._key)
        torch._C._cuda_endAllocateToPool(*self._key)

    @contextmanager
    def routed(self) -> Iterator[None]:
        """What this thread allocates in the body comes from the pool; no other thread's does."""
        self._stop()  # an interrupt may have left it open
        self._routing = True
        torch._C._cuda_beginAllocateCurrentThreadToPool(*self._key)
        try:
            yield
        finally:
            self._stop()

    def _stop(self) -> None:
        if self._routing:
            with suppress(RuntimeError):  # interrupted before it began
                torch._C._cuda_endAllocateToPool(*self._key)
                torch._C._cuda_releasePool(*self._key)
            self._routing = False

    def __del__(self) -> None:
        if hasattr(self, "_key"):
            torch._C._cuda_releasePool(*self._key)


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

        ``undo()`` follows each of the three: so the function may change its own inputs. Libraries
        keep handles and work spaces by thread and stream: both are the same for all three.

        Raises:
            NotCapturable: the function waits for the GPU or draws random numbers; nothing was
                captured or changed.
            CaptureBroken: other threads broke ``ATTEMPTS`` captures; nothing was changed.
        """
        self._parts: list[Any] = []
        self._device, self._gpu = device, cuda.gpu_of(device)
        self._function = function  # and with it the memory that its kernels use
        self._launch = cuda.driver().cuGraphLaunch
        self._stream = cuda.driver().CUstream(self._gpu.stream.cuda_stream)
        with cuda.on_engine_stream(device):
            for refuse in (RefuseDraws, RefuseWaits):
                try:
                    with refuse():
                        function()
                finally:
                    undo()
            self._gpu.stream.synchronize()
            executable = _Executable(self._captured(function, undo, pool))
        self._graph = executable.handle
        self._parts += [executable, pool]

    def _captured(
        self, function: Callable[[], None], undo: Callable[[], None], pool: GraphPool
    ) -> Any:
        """The captured function as the driver's CUgraph."""
        for _ in range(ATTEMPTS):
            try:
                with pool.routed():
                    return _capture(self._gpu, function)
            except CaptureBroken as error:
                broken = error
                # the error may stay for this thread's next launch to report: let it be this one
                with suppress(RuntimeError):
                    torch.zeros(1, device=self._device)
            finally:
                undo()
        raise broken

    def replay(self) -> None:
        """Queue all kernels, in the order of torch's current stream.

        They run on the engine stream: the graph's scratch memory is the engine's own.
        """
        if self._gpu.is_current():
            cuda.checked(self._launch(self._graph, self._stream))
        else:
            with cuda.on_engine_stream(self._device):
                self.replay()

    def __del__(self) -> None:
        if self._parts:
            self._gpu.dispose(self._parts)


def _capture(gpu: cuda.Gpu, function: Callable[[], None]) -> Any:
    """What the function launches on the engine stream, which is current, as a CUgraph."""
    driver, failure = cuda.driver(), None
    # not even this thread is forbidden anything: the garbage collector may free memory in it
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    with gpu.quiet:
        try:
            gpu.capturing = True
            cuda.checked(driver.cuStreamBeginCapture(gpu.stream.cuda_stream, mode))
            function()
        except Exception as error:
            failure = error
        finally:
            ended, graph = gpu.end_capture()
    if ended.value:
        raise CaptureBroken(f"a capture was broken by other work: {ended.name}") from failure
    if failure is not None:
        driver.cuGraphDestroy(graph)
        raise failure
    return graph


class _Executable:
    """A graph ready to launch."""

    def __init__(self, graph: Any) -> None:
        driver = cuda.driver()
        self._destroy: Any = None
        try:
            self.handle = cuda.checked(driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)
        self._destroy = driver.cuGraphExecDestroy

    def __del__(self) -> None:
        if self._destroy is not None:
            self._destroy(self.handle)


def restorer(tensors: list[torch.Tensor], device: torch.device) -> Callable[[], None]:
    """A function that puts these tensors back as they are now."""
    with cuda.on_engine_stream(device):
        copies = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        with cuda.on_engine_stream(device):
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)

    return restore
