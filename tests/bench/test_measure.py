import pytest
import torch

from fastgen.bench.contenders import Contender
from fastgen.bench.measure import WARM_UPS, Agreement, alternate
from fastgen.bench.workload import Workload


class Recorder(Contender):
    """Writes down each call as (name, new tokens)."""

    package = "torch"

    def __init__(self, name, log):
        super().__init__("cpu", torch.float32, vocab_size=16)
        self.label, self.log = name, log

    def load(self, path):
        raise AssertionError("the stopwatch loads nothing")

    def generate(self, inputs, workload):
        assert inputs.shape == (1, 32)
        self.log.append((self.label, workload.new_tokens))

    def tokens(self, output):
        raise AssertionError("the stopwatch reads no tokens")


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


@pytest.mark.parametrize(
    ("row", "expected"), [([1, 2, 3], None), ([1, 9, 3], 1), ([1, 2], 2), ([1, 2, 3, 4], 3)]
)
def test_agreement_finds_the_first_difference(row, expected):
    agreement = Agreement.of([row, [5]], [[1, 2, 3], [5]])
    assert agreement.first_difference == [expected, None]
    assert agreement.equal is (expected is None)
    assert agreement.summary == ("equal" if expected is None else "1 of 2 rows")
    if expected is not None:
        assert f"row 0 from new token {expected}" in str(agreement)
