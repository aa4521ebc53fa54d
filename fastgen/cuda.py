"""One GPU among threads: its engine stream, who may use it now, and what is destroyed when.

A stream that is being captured records whatever is launched on it, and whatever waits for it breaks
the capture. So a GPU has one engine stream that nobody else is given, one lock for all that uses
it, and one place that captures (``cuda_graph.py``).
"""

import functools
import importlib.util
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import torch

from fastgen.errors import EngineError


@functools.cache
def missing() -> str | None:
    """Why nothing can be captured here; None if it can."""
    with suppress(ModuleNotFoundError):
        if importlib.util.find_spec("cuda.bindings") is not None:
            return None
    return "the package cuda-bindings is not installed"


def driver() -> Any:
    from cuda.bindings import driver

    return driver


class Gpu:
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
        self.sides: list[Side] = []
        self.dead: deque[list[Any]] = deque()

    def is_current(self) -> bool:
        """Whether this thread launches on the engine stream, and so holds the lock."""
        current: bool = torch.cuda.current_stream(self.index) == self.stream
        return current

    def end_capture(self) -> tuple[Any, Any]:
        """The driver's error (its value 0: none) and the graph. Does no harm where none began."""
        result: tuple[Any, Any] = driver().cuStreamEndCapture(self.stream.cuda_stream)
        self.capturing = False
        return result

    def settle(self) -> None:
        """End a capture that an interrupt left open; where none was, nothing is done."""
        if self.capturing:
            error, graph = self.end_capture()
            if not error.value:
                driver().cuGraphDestroy(graph)

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


_gpus: dict[int, Gpu] = {}
_making = threading.Lock()


def gpu_of(device: torch.device) -> Gpu:
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _gpus.get(index)
    if found is None:
        with _making:
            _shield_synchronize()
            found = _gpus.get(index) or Gpu(index, _private_stream(index))
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


def _private_stream(index: int) -> torch.cuda.Stream:
    """A stream that only fastgen has: torch hands out its 32 streams again and again, so that a
    program's own work would land on the engine stream, and in a graph that is being captured."""
    if missing() is not None:
        return torch.cuda.Stream(index)
    torch.cuda.init()
    api = driver()
    checked(api.cuCtxPushCurrent(checked(api.cuDevicePrimaryCtxRetain(index))))
    try:
        # it must not wait for the default stream: other threads use that during a capture
        flags = api.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        handle = int(checked(api.cuStreamCreate(flags)))
    finally:
        api.cuCtxPopCurrent()
    return torch.cuda.ExternalStream(handle, device=torch.device("cuda", index))


Side: TypeAlias = torch.cuda.Stream
"""A stream beside the engine's, for what is captured with its work."""


def side_streams(device: torch.device, count: int) -> list[Side]:
    """The first of a GPU's side streams, up to as many as were ever asked for."""
    gpu = gpu_of(device)
    with gpu.lock:
        while len(gpu.sides) < count:
            gpu.sides.append(_private_stream(gpu.index))
    return gpu.sides[:count]


def engine_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's engines run (ONNX Runtime refuses the default stream)."""
    return gpu_of(device).stream


@contextmanager
def exclusive(device: torch.device) -> Iterator[None]:
    """No other thread of fastgen captures or launches on this GPU during the body: to make what
    waits for the GPU as it is made. On a CPU nothing is held."""
    if device.type != "cuda":
        yield
        return
    gpu = gpu_of(device)
    with gpu.lock:
        gpu.settle()
        yield
    gpu.bury()


@contextmanager
def on_engine_stream(device: torch.device) -> Iterator[None]:
    """Make the engine stream current, ordered after and before the caller's current stream."""
    gpu = gpu_of(device)
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
    if device.type == "cuda" and (gpu := gpu_of(device)).several and gpu.caller is not None:
        for tensor in tensors:
            tensor.record_stream(gpu.caller)


def dispose(device: torch.device, parts: list[Any]) -> None:
    """Destroy ``parts``, a list that alone refers to them, when no graph is being captured.

    What frees GPU memory or closes a library may wait for the whole GPU. It is called wherever the
    last reference goes, by threads that may hold any lock: so it never waits for one.
    """
    if device.type == "cuda":
        gpu_of(device).dispose(parts)


def checked(results: tuple[Any, ...]) -> Any:
    """The value of a driver call, or the error that a torch program expects."""
    error, *values = results
    if error.value:
        kind = torch.OutOfMemoryError if error.value == _OUT_OF_MEMORY else EngineError
        raise kind(f"CUDA failed: {error.name}")
    return values[0] if values else None


_OUT_OF_MEMORY = 2
