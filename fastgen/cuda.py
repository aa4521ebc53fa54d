"""One GPU among threads: its engine stream, who may use it now, and the one place that captures.

A stream that is being captured records whatever is launched on it, and whatever waits for it breaks
the capture. So a GPU has one engine stream that nobody else is given, one lock for all that uses
it, and here is all that begins and ends a capture. What other threads do meanwhile on streams of
their own is not looked at: a relaxed capture forbids nobody to allocate, free or ask for events,
only this thread's allocations go to the graph's pool, and nothing captured draws random numbers,
for which torch would have to hold the generator that all threads share. One thing no capture
survives, a wait for the whole device, which then fails itself: torch's waits while a graph is
captured, and where another library's does not, the capture is tried again.
"""

import functools
import importlib.util
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from fastgen.capturable import RefuseDraws, RefuseWaits
from fastgen.errors import EngineError, FastgenError

ATTEMPTS = 3  # captures broken by other threads, before the kernels are launched one by one


class CaptureBroken(FastgenError):
    """What other threads did broke every attempt to capture; the function itself is fine."""


@functools.cache
def missing() -> str | None:
    """Why nothing can be captured here; None if it can."""
    with suppress(ModuleNotFoundError):
        if importlib.util.find_spec("cuda.bindings") is not None:
            return None
    return "the package cuda-bindings is not installed"


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


class _Gpu:
    """What all threads share on one GPU."""

    def __init__(self, index: int, stream: torch.cuda.Stream) -> None:
        self.index, self.stream = index, stream
        self.lock = threading.RLock()
        """Taken before every other lock of fastgen, and for as long as the stream is used."""
        self.quiet = threading.RLock()
        """Held by a capture, and by what must not happen during one; no lock is taken under it."""
        self.capturing = False
        self.caller: torch.cuda.Stream | None = None
        self.several = False
        """Whether callers have been on other streams than the default one, which orders them."""
        self.dead: deque[list[Any]] = deque()

    def is_current(self) -> bool:
        """Whether this thread launches on the engine stream, and so holds the lock."""
        current: bool = torch.cuda.current_stream(self.index) == self.stream
        return current

    def end_capture(self) -> tuple[Any, Any]:
        """The driver's error (its value 0: none) and the graph. Does no harm where none began."""
        result: tuple[Any, Any] = _driver().cuStreamEndCapture(self.stream.cuda_stream)
        self.capturing = False
        return result

    def settle(self) -> None:
        """End a capture that an interrupt left open; where none was, nothing is done."""
        if self.capturing:
            error, graph = self.end_capture()
            if not error.value:
                _driver().cuGraphDestroy(graph)

    def dispose(self, parts: list[Any]) -> None:
        self.dead.append(parts)
        self.bury()

    def bury(self) -> None:
        """Destroy what waits for it. If another thread holds the lock, that thread will."""
        owned = self.lock._is_owned  # type: ignore[attr-defined]
        if owned():
            self._empty()
            return
        while self.dead:
            try:
                if not self.lock.acquire(blocking=False):
                    return
                self.settle()
                self._empty()
            finally:
                if owned():  # even if an interrupt came between the lock and the next line
                    self.lock.release()

    def _empty(self) -> None:
        while self.dead and not self.capturing:
            self.dead.popleft().clear()


_gpus: dict[int, _Gpu] = {}
_making = threading.Lock()


def _gpu(device: torch.device) -> _Gpu:
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _gpus.get(index)
    if found is None:
        with _making:
            _shield_synchronize()
            found = _gpus.get(index) or _Gpu(index, private_stream(index))
            _gpus[index] = found
    return found


@functools.cache
def _shield_synchronize() -> None:
    """Let torch's waits for a whole GPU wait until no graph is being captured there: otherwise both
    would fail, the program's own thread for what it knows nothing of."""

    def shielded(wait: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(wait)
        def synchronize(device: Any = None) -> None:
            gpu = _gpus.get(torch.cuda._utils._get_device_index(device, optional=True))
            if gpu is None:
                return wait(device)
            with gpu.quiet:
                return wait(device)

        return synchronize

    for module in (torch.cuda, torch.accelerator):
        module.synchronize = shielded(module.synchronize)  # type: ignore[attr-defined]


def private_stream(index: int) -> torch.cuda.Stream:
    """A stream that only fastgen has: torch hands out its 32 streams again and again, so that a
    program's own work would land on the engine stream, and in a graph that is being captured."""
    if missing() is not None:
        return torch.cuda.Stream(index)
    torch.cuda.init()
    driver = _driver()
    _checked(driver.cuCtxPushCurrent(_checked(driver.cuDevicePrimaryCtxRetain(index))))
    try:
        # it must not wait for the default stream: other threads use that during a capture
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        handle = int(_checked(driver.cuStreamCreate(flags)))
    finally:
        driver.cuCtxPopCurrent()
    return torch.cuda.ExternalStream(handle, device=torch.device("cuda", index))


def engine_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's engines run (ONNX Runtime refuses the default stream)."""
    return _gpu(device).stream


@contextmanager
def exclusive(device: torch.device) -> Iterator[None]:
    """No other thread of fastgen captures or launches on this GPU during the body: to make what
    waits for the GPU as it is made. On a CPU nothing is held."""
    if device.type != "cuda":
        yield
        return
    gpu = _gpu(device)
    with gpu.lock:
        gpu.settle()
        yield
    gpu.bury()


@contextmanager
def on_engine_stream(device: torch.device) -> Iterator[None]:
    """Make the engine stream current, ordered after and before the caller's current stream."""
    gpu = _gpu(device)
    stream, caller = gpu.stream, torch.cuda.current_stream(gpu.index)
    if stream == caller:
        yield  # the lock is this thread's: only here is the stream made current
        return
    with gpu.lock:
        gpu.settle()
        stream.wait_stream(caller)
        outer, gpu.caller = gpu.caller, caller
        gpu.several = gpu.several or caller.cuda_stream != 0
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            gpu.caller = outer
            gpu.settle()
            caller.wait_stream(stream)
    gpu.bury()


def hand_over(device: torch.device, tensors: Iterable[torch.Tensor]) -> None:
    """Say of tensors allocated on the engine stream that its present caller will use them on its
    own: once freed, they must not serve another thread's call before that is done."""
    if device.type == "cuda" and (gpu := _gpu(device)).several and gpu.caller is not None:
        for tensor in tensors:
            tensor.record_stream(gpu.caller)


def dispose(device: torch.device, parts: list[Any]) -> None:
    """Destroy ``parts``, a list that alone refers to them, when no graph is being captured.

    What frees GPU memory or closes a library may wait for the whole GPU. It is called wherever the
    last reference goes, by threads that may hold any lock: so it never waits for one.
    """
    if device.type == "cuda":
        _gpu(device).dispose(parts)


class GraphPool:
    """Scratch memory that captured graphs share, since they run one after the other.

    Given back with the last of the pool's graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._routing = False
        self._key = _gpu(device).index, torch.cuda.graph_pool_handle()
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
        self._device, self._gpu = device, _gpu(device)
        self._function = function  # and with it the memory that its kernels use
        self._launch = _driver().cuGraphLaunch
        self._stream = _driver().CUstream(self._gpu.stream.cuda_stream)
        with on_engine_stream(device):
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
            _checked(self._launch(self._graph, self._stream))
        else:
            with on_engine_stream(self._device):
                self.replay()

    def __del__(self) -> None:
        if self._parts:
            self._gpu.dispose(self._parts)


def _capture(gpu: _Gpu, function: Callable[[], None]) -> Any:
    """What the function launches on the engine stream, which is current, as a CUgraph."""
    driver, failure = _driver(), None
    # not even this thread is forbidden anything: the garbage collector may free memory in it
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    with gpu.quiet:
        try:
            gpu.capturing = True
            _checked(driver.cuStreamBeginCapture(gpu.stream.cuda_stream, mode))
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
        driver = _driver()
        self._destroy: Any = None
        try:
            self.handle = _checked(driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)
        self._destroy = driver.cuGraphExecDestroy

    def __del__(self) -> None:
        if self._destroy is not None:
            self._destroy(self.handle)


def _checked(results: tuple[Any, ...]) -> Any:
    """The value of a driver call, or the error that a torch program expects."""
    error, *values = results
    if error.value:
        kind = torch.OutOfMemoryError if error.value == _OUT_OF_MEMORY else EngineError
        raise kind(f"CUDA failed: {error.name}")
    return values[0] if values else None


_OUT_OF_MEMORY = 2


def restorer(tensors: list[torch.Tensor], device: torch.device) -> Callable[[], None]:
    """A function that puts these tensors back as they are now."""
    with on_engine_stream(device):
        copies = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        with on_engine_stream(device):
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)

    return restore
