"""A benchmark session: contenders loaded once, measured on any number of workloads."""

import gc
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import AutoConfig

from fastgen.bench.agreement import agreement
from fastgen.bench.contender import Contender
from fastgen.bench.contenders import contenders
from fastgen.bench.environment import environment
from fastgen.bench.floor import Machine, floor_of, measure_machine
from fastgen.bench.fresh import Job, measure_fresh
from fastgen.bench.measure import Timing, alternate, timed_call
from fastgen.bench.report import Entry, Report
from fastgen.bench.shapes import SUFFIX, kind_of, write_random_checkpoint
from fastgen.bench.workload import AnyWorkload, Encoding, Workload

PEERS = ("hf", "hf-static", "hf-compile", "ctranslate2")
"""Of some kind of model: ``hf-static`` generates, ``hf-compile`` encodes, the others do both."""
MORE_PEERS = ("openvino", "openvino-int8")
"""Those that run where they are asked for: they need an environment of their own."""
DTYPES = ("float32", "float16", "bfloat16")


class Session:
    """One model, loaded by each contender; a context manager.

    All contenders load the same checkpoint: a hub id, a folder, or, for ``NAME@random``, a
    temporary folder with random weights stored in ``dtype``.

    Args:
        model: hub id, folder or ``NAME@random`` (see ``shapes.SHAPES``).
        device: ``cpu`` or ``cuda``.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        peers: names from ``PEERS`` or ``MORE_PEERS``, to run beside ``fastgen``; those of another
            kind of model are left out.
        threads: CPU threads of every contender; None keeps torch's number.
        progress: told what is being done, for a status line.

    Raises:
        ValueError: an unknown device, dtype, peer or shape.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        peers: Sequence[str] = PEERS,
        threads: int | None = None,
        progress: Callable[[str], None] = lambda doing: None,
    ) -> None:
        _check("device", device, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
        _check("dtype", dtype, DTYPES)
        for peer in peers:
            _check("peer", peer, (*PEERS, *MORE_PEERS))
        if threads is not None:
            torch.set_num_threads(threads)
        self.model, self.device, self.dtype = model, device, dtype
        self.kind = kind_of(model)
        self.progress = progress
        self._folder = tempfile.TemporaryDirectory(prefix="fastgen-bench-")
        checkpoint = self._checkpoint()
        self.vocab_size: int = AutoConfig.from_pretrained(checkpoint).vocab_size
        self.contenders: dict[str, Contender] = {}
        self.paths: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        for name, made in contenders(self.kind).items():
            if name == "fastgen" or name in peers:
                self._load(made, checkpoint)
        self.progress("measuring the machine")
        self.machine: Machine = measure_machine(device, getattr(torch, dtype))

    def measure(
        self,
        workload: AnyWorkload,
        *,
        repeats: int = 5,
        min_seconds: float = 1.0,
        fresh: bool = True,
    ) -> list[Entry]:
        """Measure all contenders on one workload.

        Args:
            workload: an ``Encoding`` for an encoder, a ``Workload`` for the others.
            repeats: at least so many timed rounds.
            min_seconds: at least so long in timed rounds.
            fresh: also start one process per contender for ``load_s`` and ``peak_bytes``, which
                stay None without.

        Returns:
            An entry for each contender; one that failed has the reason instead of figures.

        Raises:
            ValueError: the workload is for another kind of model.
        """
        if isinstance(workload, Encoding) != (self.kind == "encoder"):
            raise ValueError(f"{type(workload).__name__}: no workload of {self.model}")
        entries = {
            name: Entry(name, self.model, self.device, self.dtype, workload, contender.version)
            for name, contender in self.contenders.items()
        }
        results: dict[str, Any] = {}
        for name, entry in entries.items():
            entry.reason = self.reasons.get(name)
            if entry.reason is None:
                self._attempt(entry, lambda entry: self._first_call(entry, results))
        running = {name: self.contenders[name] for name in results}
        timings = alternate(
            running, workload, repeats=repeats, min_seconds=min_seconds, progress=self.progress
        )
        for name, timing in timings.items():
            self._fill(entries[name], timing, results)
            if fresh:
                self.progress(f"load time and peak memory of {name}")
                self._attempt(entries[name], self._measure_fresh)
        ours = entries["fastgen"].ms_per_call
        for name, entry in entries.items():
            if name != "fastgen" and ours and entry.ms_per_call:
                entry.ratio = entry.ms_per_call / ours
        return list(entries.values())

    def close(self) -> None:
        """Free the models and the temporary folder."""
        for contender in self.contenders.values():
            contender.close()
        self.contenders.clear()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self._folder.cleanup()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _checkpoint(self) -> str:
        if not self.model.endswith(SUFFIX):
            return self.model
        self.progress(f"drawing the weights of {self.model}")
        folder = Path(self._folder.name) / "checkpoint"
        write_random_checkpoint(
            self.model.removesuffix(SUFFIX),
            folder,
            dtype=getattr(torch, self.dtype),
            device=self.device,
        )
        return str(folder)

    def _load(self, made: type[Contender], checkpoint: str) -> None:
        dtype: torch.dtype = getattr(torch, self.dtype)
        contender, name = made(self.kind, self.device, dtype, self.vocab_size), made.name
        self.contenders[name] = contender
        if contender.version is None:
            self.reasons[name] = contender.missing
            return
        try:
            self.progress(f"preparing {name}")
            self.paths[name] = contender.prepare(checkpoint, Path(self._folder.name))
            self.progress(f"loading {name}")
            contender.load(self.paths[name])
        except Exception as error:  # whatever ails a contender, the others are still measured
            self.reasons[name] = _reason(error)

    def _attempt(self, entry: Entry, step: Callable[[Entry], None]) -> None:
        try:
            step(entry)
        except Exception as error:  # as in _load
            entry.reason = _reason(error)

    def _first_call(self, entry: Entry, results: dict[str, Any]) -> None:
        self.progress(f"first call of {entry.name}")
        contender = self.contenders[entry.name]
        inputs = contender.inputs(entry.workload)
        entry.first_call_s, output = timed_call(contender, inputs, entry.workload)
        results[entry.name] = contender.result(output)

    def _fill(self, entry: Entry, timing: Timing, results: dict[str, Any]) -> None:
        contender, workload = self.contenders[entry.name], entry.workload
        _fill_times(entry, timing, results[entry.name])
        self._fill_floor(entry)
        entry.engine = contender.engine(workload)
        sampled = isinstance(workload, Workload) and workload.sample
        comparable = contender.draws_with_torch or not sampled
        if entry.name != "hf" and "hf" in results and comparable:
            entry.agreement = agreement(results[entry.name], results["hf"])

    def _fill_floor(self, entry: Entry) -> None:
        models = (contender.model for contender in self.contenders.values())
        model = next((model for model in models if model is not None), None)
        took = entry.ms_per_token or entry.ms_per_call
        if model is None or not took:
            return
        floor = floor_of(model, entry.workload, self.kind)
        entry.floor_bytes, entry.floor_flops = floor.bytes, floor.flops
        entry.floor_ms = floor.seconds(self.machine) * 1e3
        entry.computes = floor.computes(self.machine)
        entry.gb_per_s, entry.tflop_per_s = floor.bytes / took / 1e6, floor.flops / took / 1e9

    def _measure_fresh(self, entry: Entry) -> None:
        job = Job(
            contender=entry.name,
            kind=self.kind,
            path=self.paths[entry.name],
            device=self.device,
            dtype=self.dtype,
            threads=torch.get_num_threads(),
            vocab_size=self.vocab_size,
            workload=entry.workload.as_dict(),
        )
        found = measure_fresh(job)
        entry.load_s, entry.peak_bytes = found.load_s, found.peak_bytes


def run(
    models: Iterable[str],
    workloads: Sequence[AnyWorkload] | Callable[[str], Sequence[AnyWorkload]],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    peers: Sequence[str] = PEERS,
    threads: int | None = None,
    json_file: Path | None = None,
    progress: Callable[[str], None] = lambda doing: None,
    **measure_options: Any,
) -> Report:
    """Measure every workload on every model, one session for each model.

    Args:
        workloads: for all models; or what gives them for a kind of model: ``seq2seq``, ``causal``
            or ``encoder``.
        json_file: written anew after each workload, so that an interrupted run is not lost.
        measure_options: as ``Session.measure``; the others as ``Session``.

    Raises:
        ValueError: as ``Session``.
    """
    report = Report(environment={})
    for model in models:
        asked = workloads(kind_of(model)) if callable(workloads) else workloads
        with Session(
            model, device=device, dtype=dtype, peers=peers, threads=threads, progress=progress
        ) as session:
            report.environment = environment(device) | session.machine.facts
            for workload in asked:
                report.entries += session.measure(workload, **measure_options)
                if json_file is not None:
                    json_file.write_text(report.to_json() + "\n", encoding="utf-8")
    return report


def _fill_times(entry: Entry, timing: Timing, result: Any) -> None:
    entry.calls_s = timing.calls_s
    entry.ms_per_call = timing.call_s * 1e3
    if isinstance(entry.workload, Encoding):
        entry.tokens_per_s = sum(entry.workload.lengths) / timing.call_s
        return
    entry.new_tokens = max(map(len, result))
    entry.ms_per_token = entry.ms_per_call / entry.new_tokens
    entry.tokens_per_s = sum(map(len, result)) / timing.call_s
    entry.ttft_ms = None if timing.ttft_s is None else timing.ttft_s * 1e3


def _check(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r}: allowed here are {', '.join(allowed)}.")


def _reason(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"
