import torch

from fastgen.bench.contender import Contender
from fastgen.bench.measure import WARM_UPS, alternate
from fastgen.bench.workload import Encoding, Workload


class Recorder(Contender):
    """Writes down each call as (name, new tokens), or an encoder's as its name."""

    package = "torch"

    def __init__(self, name, log):
        super().__init__("causal", "cpu", torch.float32, vocab_size=16)
        self.label, self.log = name, log

    def load(self, path):
        raise AssertionError("the stopwatch loads nothing")

    def inputs(self, workload):
        return "inputs"

    def call(self, inputs, workload):
        assert inputs == "inputs"
        new = getattr(workload, "new_tokens", None)
        self.log.append((self.label, new) if new else self.label)

    def result(self, output):
        raise AssertionError("the stopwatch reads no results")


def test_contenders_take_turns_after_warm_up():
    log = []
    contenders = {name: Recorder(name, log) for name in ("a", "b")}
    timings = alternate(
        contenders, Workload(new_tokens=7), repeats=2, min_seconds=0, progress=lambda doing: None
    )
    a, b = [("a", 7), ("a", 1)], [("b", 7), ("b", 1)]
    assert log == a * WARM_UPS + b * WARM_UPS + a + b + b + a
    for timing in timings.values():
        assert len(timing.calls_s) == len(timing.first_token_calls_s) == 2


def test_rounds_go_on_until_the_least_time_has_passed(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("fastgen.bench.measure.time.perf_counter", lambda: next(clock))
    timings = alternate(
        {"a": Recorder("a", [])}, Workload(), repeats=1, min_seconds=10, progress=lambda doing: None
    )
    # Each round reads the clock five times: twice for each of two calls, once for the total.
    assert len(timings["a"].calls_s) == 2
    assert timings["a"].call_s == 1


def test_no_contenders_no_rounds():
    nothing = alternate({}, Workload(), repeats=3, min_seconds=0, progress=lambda doing: None)
    assert nothing == {}


def test_calls_of_an_encoder_have_no_first_token():
    log = []
    timings = alternate(
        {"a": Recorder("a", log)}, Encoding(), repeats=2, min_seconds=0, progress=lambda doing: None
    )
    assert log == ["a"] * (WARM_UPS + 2)
    assert len(timings["a"].calls_s) == 2
    assert timings["a"].ttft_s is None
