"""What was measured, as a table for people and a list for programs."""

import json
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fastgen.bench.agreement import Agreement, Distance
from fastgen.bench.environment import describe
from fastgen.bench.workload import AnyWorkload, Encoding

DASH = "-"

NOTES = (
    "Whole calls, contenders taking turns in one process, medians. ms/token: a generate call over "
    "its new tokens; ttft: time to first token, the same call with one new token; ratio: of times, "
    "over fastgen's; tokens: against hf's; max diff: the largest of one element of the hidden "
    "states of real tokens, from hf's in the same dtype. GB/s or TFLOP/s, whichever takes longer: "
    "what a token (of an encoder: a call) must move or compute, over its time; floor: the least "
    "time that takes, at the rate of a copy or a large matrix product measured here, as a share "
    "of its time (fastgen/bench/floor.py). Every contender's end-of-sequence id lies outside the "
    "vocabulary, so all generate all tokens. Load (imports, weights from a warm disk, the first "
    "whole call) and peak memory (MiB): each contender alone in a fresh process, compiled "
    "artefacts of earlier runs at hand. Converting a checkpoint for CTranslate2 is not counted."
)


@dataclass
class Entry:
    """One contender on one workload; a figure is None where ``reason`` says why."""

    name: str
    model: str
    device: str
    dtype: str
    workload: AnyWorkload
    version: str | None = None
    new_tokens: int | None = None
    ms_per_token: float | None = None
    """Of ``generate``; None of an encoder."""
    ms_per_call: float | None = None
    tokens_per_s: float | None = None
    ttft_ms: float | None = None
    load_s: float | None = None
    peak_bytes: int | None = None
    first_call_s: float | None = None
    """The workload's first call in the timing process: warm-up, capture or compilation."""
    ratio: float | None = None
    """For peers: their time over fastgen's."""
    agreement: Agreement | Distance | None = None
    """Against the stock class's results; None for the stock class itself or where it did not
    run."""
    floor_bytes: int | None = None
    """What a token, or an encoder's call, must move (see ``floor.py``)."""
    floor_flops: int | None = None
    """What it must compute."""
    floor_ms: float | None = None
    """The least time that takes on this machine."""
    gb_per_s: float | None = None
    """``floor_bytes`` over the time taken."""
    tflop_per_s: float | None = None
    """``floor_flops`` over the time taken."""
    computes: bool = False
    """Whether it is the computing that makes ``floor_ms``, not the moving."""
    engine: str | None = None
    """Which of its ways fastgen took: ``fast loop, fused kernels``, say."""
    calls_s: list[float] = field(default_factory=list)
    reason: str | None = None

    @property
    def share_of_floor(self) -> float | None:
        """``floor_ms`` over the time taken; None if that was not measured."""
        took = self.ms_per_call if isinstance(self.workload, Encoding) else self.ms_per_token
        return self.floor_ms / took if self.floor_ms and took else None

    def as_dict(self, environment: dict[str, Any]) -> dict[str, Any]:
        """JSON-able; ``ratio`` only for peers."""
        record = dict(self.__dict__)
        if self.name == "fastgen":
            del record["ratio"]
        record["workload"] = self.workload.as_dict()
        record["agreement"] = self.agreement.as_json() if self.agreement else None
        record["share_of_floor"] = self.share_of_floor
        return record | {"environment": environment}


@dataclass
class Report:
    """All entries of one or more workloads, in the order they were measured."""

    environment: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)

    def to_json(self) -> str:
        """A list of contenders, one for each workload; their fields are Entry's."""
        return json.dumps([entry.as_dict(self.environment) for entry in self.entries], indent=1)

    def failures(self) -> list[str]:
        """What makes the run a failure: fastgen did not run, or not exactly where it must.

        In fp32 on the CPU fastgen's tokens must equal the stock class's, and its hidden states to
        rounding. In other dtypes, on a
        GPU, and for peers, near ties may fall either way; the table says where they did.
        """
        found = []
        for entry in self.entries:
            if entry.name != "fastgen":
                continue
            where = f"{entry.model}, {entry.workload.title}"
            if entry.reason:
                found.append(f"{where}: fastgen did not run: {entry.reason}")
            exact = entry.device == "cpu" and entry.dtype == "float32"
            if exact and entry.agreement and not entry.agreement.equal:
                found.append(f"{where}: fastgen's results differ: {entry.agreement}")
        return found

    def print(self, console: Console) -> None:
        """One table for each workload, then what the figures mean, their place and failures."""
        groups: dict[tuple[str, str, AnyWorkload], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.model, entry.dtype, entry.workload), []).append(entry)
        for (model, dtype, workload), entries in groups.items():
            title = f"{model}, {entries[0].device}, {dtype}: {workload.title}"
            console.print(title, style="italic", markup=False, highlight=False)
            console.print(_table(entries))
            for entry in entries:
                if entry.reason:
                    console.print(f"{entry.name}: {entry.reason}", markup=False)
                elif entry.agreement and not entry.agreement.equal:
                    console.print(f"{entry.name}: {entry.agreement}", markup=False)
                if entry.engine:
                    console.print(f"{entry.name} ran: {entry.engine}", markup=False)
        console.print(NOTES, describe(self.environment), sep="\n", markup=False, highlight=False)
        for failure in self.failures():
            console.print(f"FAILED: {failure}", style="red", markup=False)


def _table(entries: list[Entry]) -> Table:
    first = entries[0]
    table = Table(box=SIMPLE, padding=0)
    table.add_column("contender", no_wrap=True)
    encodes = isinstance(first.workload, Encoding)
    rate = "TFLOP/s" if any(entry.computes for entry in entries) else "GB/s"
    headings = ["ms/call", "tokens/s"] if encodes else ["ms/token", "ttft ms"]
    headings += ["load s", "MiB", rate, "floor", "ratio"]
    for heading in (*headings, "max diff" if encodes else "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        tokens = _number(entry.ms_per_token, 3), _number(entry.ttft_ms, 2)
        calls = _number(entry.ms_per_call, 3), _number(entry.tokens_per_s, 0)
        table.add_row(
            entry.name,
            *(calls if encodes else tokens),
            _number(entry.load_s, 2),
            _number(entry.peak_bytes and entry.peak_bytes / 2**20, 0),
            _number(entry.tflop_per_s, 3) if entry.computes else _number(entry.gb_per_s, 1),
            f"{entry.share_of_floor:.1%}" if entry.share_of_floor else DASH,
            f"{entry.ratio:.2f}x" if entry.ratio else DASH,
            entry.agreement.summary if entry.agreement else DASH,
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:,.{digits}f}"
