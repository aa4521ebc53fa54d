"""Who may use a GPU's engine stream, and what is captured, with a driver that is a fake.

Captures themselves: tests/gpu.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgen import cuda, cuda_graph
from fastgen.execution.capturing import Capturing
from fastgen.options import EngineOptions
from fastgen.target import onnxruntime_cuda

GPU = torch.device("cuda", 0)
PACKAGE = Path(cuda.__file__).parent


# The GPU, as far as cuda.py sees it


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name, self.cuda_stream, self.waited_for = name, 7, []  # type: ignore[var-annotated]

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other.name)

    def synchronize(self) -> None:
        pass


class FakeDriver:
    """Counts what is captured; ``broken`` captures fail when they end."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.open = False
        self.broken = 0
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
        self.CUstream = int

    def _result(self, event: str, value: Any = None, error: int = 0) -> tuple[Any, Any]:
        self.events.append(event)
        return SimpleNamespace(value=error, name=f"CUDA_ERROR_{error}"), value

    def cuStreamBeginCapture(self, stream: int, mode: str) -> Any:
        self.open = True
        return self._result(f"begin {mode}")

    def cuStreamEndCapture(self, stream: int) -> Any:
        error = 0 if self.open and not self.broken else 901
        self.open, self.broken = False, max(0, self.broken - 1)
        return self._result("end", "graph", error)

    def cuGraphInstantiate(self, graph: str, flags: int) -> Any:
        return self._result("instantiate", "executable")

    def cuGraphLaunch(self, graph: str, stream: int) -> Any:
        return self._result("launch")

    def cuGraphDestroy(self, graph: str) -> Any:
        return self._result("destroy graph")

    def cuGraphExecDestroy(self, graph: str) -> Any:
        assert not self.open, "in the middle of a capture"
        return self._result("destroy")


class FakePool:
    def __init__(self, device: torch.device | None = None) -> None:
        self.routing = False

    @contextmanager
    def routed(self) -> Iterator[None]:
        assert not self.routing
        self.routing = True
        try:
            yield
        finally:
            self.routing = False


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A machine with one GPU, whose current stream is each thread's own."""
    fake, engine, local = FakeDriver(), FakeStream("engine"), threading.local()

    @contextmanager
    def stream(new: FakeStream) -> Iterator[None]:
        old, local.stream = current(), new
        try:
            yield
        finally:
            local.stream = old

    def current(index: int = 0) -> Any:
        if not hasattr(local, "stream"):
            local.stream = FakeStream("caller")
        return local.stream

    monkeypatch.setattr(cuda, "driver", lambda: fake)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda_graph, "GraphPool", FakePool)
    monkeypatch.setattr(cuda, "_gpus", {0: cuda.Gpu(0, engine)})  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *axes, device=None, **kw: zeros(*axes, **kw))
    return fake


def captured(function: Callable[[], None], undo: Callable[[], None] = lambda: None) -> Any:
    return cuda_graph.CapturedGraph(function, GPU, undo, FakePool())  # type: ignore[arg-type]


def in_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive(), "it waits for a lock"


def test_a_capture_is_made_once_and_replayed(driver: FakeDriver) -> None:
    counts = {"run": 0, "undone": 0}
    graph = captured(
        lambda: counts.update(run=counts["run"] + 1),
        lambda: counts.update(undone=counts["undone"] + 1),
    )
    assert driver.events == ["begin relaxed", "end", "instantiate", "destroy graph"]
    assert counts == {"run": 3, "undone": 3}
    graph.replay()
    with cuda.on_engine_stream(GPU):
        graph.replay()
    assert driver.events[4:] == ["launch", "launch"]
    del graph
    assert driver.events[6:] == ["destroy"]


def test_a_broken_capture_is_tried_again(driver: FakeDriver) -> None:
    driver.broken = cuda_graph.ATTEMPTS - 1
    captured(lambda: None)
    assert driver.events.count("end") == cuda_graph.ATTEMPTS


def test_what_others_keep_breaking_is_launched_kernel_by_kernel(driver: FakeDriver) -> None:
    driver.broken = cuda_graph.ATTEMPTS
    with pytest.raises(cuda_graph.CaptureBroken, match="CUDA_ERROR_901"):
        captured(lambda: None)
    driver.broken = cuda_graph.ATTEMPTS
    runs: list[int] = []
    owner = Capturing(onnxruntime_cuda("float32"), GPU, EngineOptions())
    replay = owner._captured(lambda: runs.append(1))
    runs.clear()
    replay()
    assert runs == [1]
    assert "launch" not in driver.events


def test_an_error_in_the_middle_ends_the_capture(driver: FakeDriver) -> None:
    for kind in (ValueError, KeyboardInterrupt):

        def fail(kind: type[BaseException] = kind) -> None:
            if driver.open:
                raise kind

        with pytest.raises(kind):
            captured(fail)
        assert not driver.open
        assert not cuda.gpu_of(GPU).capturing


def test_an_interrupt_where_a_capture_ends_leaves_none_open(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, end = cuda.gpu_of(GPU), cuda.Gpu.end_capture

    def interrupted(self: Any) -> Any:
        monkeypatch.setattr(cuda.Gpu, "end_capture", end)
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda.Gpu, "end_capture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        captured(lambda: None)
    assert not driver.open
    assert not gpu.capturing


# Locks


def test_the_engine_stream_follows_and_precedes_the_callers(driver: FakeDriver) -> None:
    caller, engine = torch.cuda.current_stream(), cuda.engine_stream(GPU)
    with cuda.on_engine_stream(GPU):
        assert torch.cuda.current_stream() is engine
        with cuda.on_engine_stream(GPU):
            assert engine.waited_for == ["caller"]
    assert torch.cuda.current_stream() is caller
    assert caller.waited_for == ["engine"]


def test_the_callers_stream_goes_on_with_what_is_handed_over(driver: FakeDriver) -> None:
    class FakeTensor:
        def record_stream(self, stream: FakeStream) -> None:
            used_on.append(stream.name)

    used_on: list[str] = []
    caller: Any = torch.cuda.current_stream()
    caller.cuda_stream = 0
    with cuda.on_engine_stream(GPU):
        cuda.hand_over(GPU, [FakeTensor()])  # type: ignore[list-item]
    assert not used_on, "the default stream orders all calls"
    with cuda.on_engine_stream(GPU):
        inner: Any = FakeStream("inner")
        with torch.cuda.stream(inner), cuda.on_engine_stream(GPU):
            cuda.hand_over(GPU, [FakeTensor()])  # type: ignore[list-item]
        cuda.hand_over(GPU, [FakeTensor()])  # type: ignore[list-item]
    assert used_on == ["inner", "caller"]


def test_one_thread_at_a_time_is_on_the_engine_stream(driver: FakeDriver) -> None:
    inside, most = [0], [0]

    def use() -> None:
        for _ in range(200):
            with cuda.on_engine_stream(GPU):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_what_dies_in_another_thread_waits_for_no_lock_and_for_no_capture(
    driver: FakeDriver,
) -> None:
    graphs = [captured(lambda: None)]

    def function() -> None:
        if driver.open:
            in_thread(graphs.clear)
            assert "destroy" not in driver.events
            assert len(cuda.gpu_of(GPU).dead) == 1

    other = captured(function)
    assert driver.events.count("destroy") == 1, "whoever held the lock destroys it"
    del other
    assert driver.events.count("destroy") == 2


def test_what_the_garbage_collector_frees_in_a_capture_waits_for_its_end(
    driver: FakeDriver,
) -> None:
    graphs = [captured(lambda: None)]

    def function() -> None:
        if driver.open:
            graphs.clear()
            assert "destroy" not in driver.events

    other = captured(function)
    assert driver.events.count("destroy") == 1
    other.replay()


def test_a_gpu_is_not_held_while_another_is_used(driver: FakeDriver) -> None:
    cuda._gpus[1] = cuda.Gpu(1, FakeStream("second"))  # type: ignore[arg-type]

    def use() -> None:
        with cuda.on_engine_stream(torch.device("cuda", 1)):
            used.append(1)

    used: list[int] = []
    with cuda.on_engine_stream(GPU):
        in_thread(use)
    assert used


def test_a_wait_for_the_whole_gpu_waits_for_a_capture(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[bool] = []
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "synchronize", lambda device=None: waits.append(driver.open))
    cuda._shield_synchronize.cache_clear()
    cuda._shield_synchronize()
    threads = [
        threading.Thread(target=wait, args=(GPU,))
        for wait in (torch.cuda.synchronize, torch.accelerator.synchronize)
    ]

    def function() -> None:
        if driver.open:
            for thread in threads:
                thread.start()
                thread.join(timeout=0.05)
            assert not waits

    captured(function)
    for thread in threads:
        thread.join(timeout=10)
    assert waits == [False, False]
    torch.cuda.synchronize(torch.device("cuda", 5))  # one that fastgen does not use


# The package


def calls_of(names: tuple[str, ...]) -> set[str]:
    """The files of the package in which one of these names occurs."""
    return {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.Name) and node.id in names)
    }


def test_one_place_captures() -> None:
    begin = ("capture_begin", "CUDAGraph", "cuStreamBeginCapture", "make_graphed_callables")
    assert calls_of(begin) == {"cuda_graph.py"}
    assert calls_of(("CapturedGraph",)) == {"execution/capturing.py"}


def test_no_other_stream_pinned_memory_or_wait_for_the_whole_gpu() -> None:
    assert calls_of(("Stream", "ExternalStream")) <= {"cuda.py"}
    source = {file: file.read_text() for file in PACKAGE.rglob("*.py")}
    places = {f.relative_to(PACKAGE).parts[0] for f, s in source.items() if "cuda.synchronize" in s}
    assert places <= {"bench"}
    pinned = {f.relative_to(PACKAGE).as_posix() for f, s in source.items() if "pin_memory" in s}
    assert pinned == {"execution/capturing.py"}
