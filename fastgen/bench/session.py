"""A benchmark session: contenders loaded once, measured on any number of workloads."""

import gc
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import AutoConfig

from fastgen.bench.contenders import CONTENDERS, Contender
from fastgen.bench.environment import environment
from fastgen.bench.fresh import Job, measure_fresh
from fastgen.bench.measure import Agreement, Timing, alternate, timed_call
from fastgen.bench.report import Entry, Report
from fastgen.bench.shapes import SUFFIX, write_random_checkpoint
from fastgen.bench.workload import Workload

DTYPES = ("float32", "float16", "bfloat16")


class Session:
    """One model, loaded by each contender; a context manager.

    All contenders load the same checkpoint: a hub id, a folder, or, for ``NAME@random``, a
    temporary folder with random weights stored in ``dtype``.

    Args:
        model: hub id, folder or ``NAME@random`` (see ``shapes.SHAPES``).
        device: ``cpu`` or ``cuda``.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        peers: names from ``CONTENDERS``, to run beside ``fastgen``.
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
        peers: Sequence[str] = ("hf", "hf-static", "ctranslate2"),
        threads: int | None = None,
        progress: Callable[[str], None] = lambda doing: None,
    ) -> None:
        _check("device", device, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
        _check("dtype", dtype, DTYPES)
        for peer in peers:
            _check("peer", peer, [name for name in CONTENDERS if name != "fastgen"])
        if threads is not None:
            torch.set_num_threads(threads)
        self.model, self.device, self.dtype = model, device, dtype
        self.progress = progress
        self._folder = tempfile.TemporaryDirectory(prefix="fastgen-bench-")
        checkpoint = self._checkpoint()
        self.vocab_size: int = AutoConfig.from_pretrained(checkpoint).vocab_size
        self.contenders: dict[str, Contender] = {}
        self.paths: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        for name in [name for name in CONTENDERS if name == "fastgen" or name in peers]:
            self._load(name, checkpoint)

    def measure(
        self,
        workload: Workload,
        *,
        repeats: int = 5,
        min_seconds: float = 1.0,
        fresh: bool = True,
    ) -> list[Entry]:
        """Measure all contenders on one workload.

        Args:
            repeats: at least so many timed rounds.
            min_seconds: at least so long in timed rounds.
            fresh: also start one process per contender for ``load_s`` and ``peak_bytes``, which
                stay None without.

        Returns:
            An entry for each contender; one that failed has the reason instead of figures.
        """
        entries = {
            name: Entry(name, self.model, self.device, self.dtype, workload, contender.version)
            for name, contender in self.contenders.items()
        }
        tokens: dict[str, list[list[int]]] = {}
        for name, entry in entries.items():
            entry.reason = self.reasons.get(name)
            if entry.reason is None:
                self._attempt(entry, lambda entry: self._first_call(entry, tokens))
        running = {name: self.contenders[name] for name in tokens}
        timings = alternate(
            running, workload, repeats=repeats, min_seconds=min_seconds, progress=self.progress
        )
        for name, timing in timings.items():
            _fill(entries[name], timing, tokens[name])
            comparable = running[name].draws_with_torch or not workload.sample
            if name != "hf" and "hf" in tokens and comparable:
                entries[name].agreement = Agreement.of(tokens[name], tokens["hf"])
            if fresh:
                self.progress(f"load time and peak memory of {name}")
                self._attempt(entries[name], self._measure_fresh)
        ours = entries["fastgen"].ms_per_token
        for name, entry in entries.items():
            if name != "fastgen" and ours and entry.ms_per_token:
                entry.ratio = entry.ms_per_token / ours
        return list(entries.values())

    def close(self) -> None:
        """Free the models and the temporary folder."""
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

    def _load(self, name: str, checkpoint: str) -> None:
        contender = CONTENDERS[name](self.device, getattr(torch, self.dtype), self.vocab_size)
        self.contenders[name] = contender
        if contender.version is None:
            self.reasons[name] = f"not installed: pip install {contender.package}"
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

    def _first_call(self, entry: Entry, tokens: dict[str, list[list[int]]]) -> None:
        self.progress(f"first call of {entry.name}")
        contender = self.contenders[entry.name]
        inputs = contender.inputs(entry.workload)
        entry.first_call_s, output = timed_call(contender, inputs, entry.workload)
        tokens[entry.name] = contender.tokens(output)

    def _measure_fresh(self, entry: Entry) -> None:
        job = Job(
            contender=entry.name,
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
    workloads: Sequence[Workload],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    peers: Sequence[str] = ("hf", "hf-static", "ctranslate2"),
    threads: int | None = None,
    json_file: Path | None = None,
    progress: Callable[[str], None] = lambda doing: None,
    **measure_options: Any,
) -> Report:
    """Measure every workload on every model, one session for each model.

    Args:
        json_file: written anew after each workload, so that an interrupted run is not lost.
        measure_options: as ``Session.measure``; the others as ``Session``.

    Raises:
        ValueError: as ``Session``.
    """
    report = Report(environment={})
    for model in models:
        with Session(
            model, device=device, dtype=dtype, peers=peers, threads=threads, progress=progress
        ) as session:
            report.environment = environment(device)
            for workload in workloads:
                report.entries += session.measure(workload, **measure_options)
                if json_file is not None:
                    json_file.write_text(report.to_json() + "\n", encoding="utf-8")
    return report


def _fill(entry: Entry, timing: Timing, tokens: list[list[int]]) -> None:
    entry.new_tokens = max(map(len, tokens))
    entry.calls_s = timing.calls_s
    entry.ms_per_token = timing.call_s / entry.new_tokens * 1e3
    entry.tokens_per_s = sum(map(len, tokens)) / timing.call_s
    entry.ttft_ms = timing.ttft_s * 1e3


def _check(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r}: allowed here are {', '.join(allowed)}.")


def _reason(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"
