"""Stopwatches: contenders take turns, so that a slow or hot spell of the machine meets all."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastgen.bench.contender import Contender
from fastgen.bench.workload import AnyWorkload, Workload

WARM_UPS = 2


@dataclass
class Timing:
    """Seconds of each timed call of one contender."""

    calls_s: list[float]
    first_token_calls_s: list[float]

    @property
    def call_s(self) -> float:
        """Median seconds of the whole call."""
        return statistics.median(self.calls_s)

    @property
    def ttft_s(self) -> float | None:
        """Median seconds of the same call stopped after one token; None of an encoder."""
        return statistics.median(self.first_token_calls_s) if self.first_token_calls_s else None


def timed_call(contender: Contender, inputs: Any, workload: AnyWorkload) -> tuple[float, Any]:
    """Seconds of one whole call, device included, and its output."""
    _synchronize(contender.device)
    start = time.perf_counter()
    output = contender.call(inputs, workload)
    _synchronize(contender.device)
    return time.perf_counter() - start, output


def alternate(
    contenders: Mapping[str, Contender],
    workload: AnyWorkload,
    *,
    repeats: int,
    min_seconds: float,
    progress: Callable[[str], None],
) -> dict[str, Timing]:
    """Time warm contenders in rounds until ``repeats`` rounds and ``min_seconds`` have passed.

    A round is one whole call, and of ``generate`` one call of a single token, of each contender;
    each round starts with the next contender.
    """
    inputs = {name: contender.inputs(workload) for name, contender in contenders.items()}
    timings = {name: Timing([], []) for name in contenders}

    def calls(name: str) -> Iterator[tuple[list[float], float]]:
        timing, contender = timings[name], contenders[name]
        yield timing.calls_s, timed_call(contender, inputs[name], workload)[0]
        if isinstance(workload, Workload):
            first = timed_call(contender, inputs[name], workload.first_token())
            yield timing.first_token_calls_s, first[0]

    for name in contenders:
        progress(f"warming up {name}")
        for _ in range(WARM_UPS):
            list(calls(name))
    names = list(contenders)
    start = time.perf_counter()
    done = 0
    while names and (done < repeats or time.perf_counter() - start < min_seconds):
        progress(f"timing, round {done + 1}")
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            for times, seconds in calls(name):
                times.append(seconds)
        done += 1
    return timings


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
