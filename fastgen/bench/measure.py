"""Stopwatches: contenders take turns, so that a slow or hot spell of the machine meets all."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastgen.bench.contenders import Contender
from fastgen.bench.workload import Workload

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
    def ttft_s(self) -> float:
        """Median seconds of the same call stopped after one token."""
        return statistics.median(self.first_token_calls_s)


@dataclass(frozen=True)
class Agreement:
    """Where a contender's tokens leave the stock class's."""

    first_difference: list[int | None]
    """Per row, the index of the first other new token; None if the row is equal."""

    @classmethod
    def of(cls, tokens: list[list[int]], reference: list[list[int]]) -> "Agreement":
        """Compare new ids row by row; a row that is only longer or shorter also differs."""
        return cls([_first_difference(*rows) for rows in zip(tokens, reference, strict=True)])

    @property
    def equal(self) -> bool:
        return all(index is None for index in self.first_difference)

    @property
    def summary(self) -> str:
        """For a table: ``equal`` or ``14 of 16 rows``."""
        rows = len(self.first_difference)
        return "equal" if self.equal else f"{self.first_difference.count(None)} of {rows} rows"

    def __str__(self) -> str:
        differences = ", ".join(
            f"row {row} from new token {index}"
            for row, index in enumerate(self.first_difference)
            if index is not None
        )
        return (
            f"{self.summary} equal to hf; others: {differences}" if differences else "equal to hf"
        )


def timed_call(contender: Contender, inputs: Any, workload: Workload) -> tuple[float, Any]:
    """Seconds of one whole ``generate`` call, device included, and its output."""
    _synchronize(contender.device)
    start = time.perf_counter()
    output = contender.generate(inputs, workload)
    _synchronize(contender.device)
    return time.perf_counter() - start, output


def alternate(
    contenders: Mapping[str, Contender],
    workload: Workload,
    *,
    repeats: int,
    min_seconds: float,
    progress: Callable[[str], None],
) -> dict[str, Timing]:
    """Time warm contenders in rounds until ``repeats`` rounds and ``min_seconds`` have passed.

    A round is one whole call and one call of a single token of each contender; each round starts
    with the next contender.
    """
    inputs = {name: contender.inputs(workload) for name, contender in contenders.items()}
    first_token = workload.first_token()
    timings = {name: Timing([], []) for name in contenders}
    for name, contender in contenders.items():
        progress(f"warming up {name}")
        for _ in range(WARM_UPS):
            timed_call(contender, inputs[name], workload)
            timed_call(contender, inputs[name], first_token)
    names = list(contenders)
    start = time.perf_counter()
    done = 0
    while names and (done < repeats or time.perf_counter() - start < min_seconds):
        progress(f"timing, round {done + 1}")
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            seconds, _ = timed_call(contenders[name], inputs[name], workload)
            timings[name].calls_s.append(seconds)
            seconds, _ = timed_call(contenders[name], inputs[name], first_token)
            timings[name].first_token_calls_s.append(seconds)
        done += 1
    return timings


def _first_difference(row: list[int], reference: list[int]) -> int | None:
    for index, (token, expected) in enumerate(itertools.zip_longest(row, reference)):
        if token != expected:
            return index
    return None


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
