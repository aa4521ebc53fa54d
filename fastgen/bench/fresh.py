"""Load time and peak memory of one contender, each in a process of its own.

A process's peak is the sum of all it ever did, so contenders that are timed side by side cannot
be told apart there. ``measure_fresh`` starts ``python -m fastgen.bench.fresh`` for one contender.
"""

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen.bench.contenders import contenders
from fastgen.bench.measure import timed_call
from fastgen.bench.workload import workload_from

_STEADY_CALLS = 2
_SAMPLE_SECONDS = 0.002


@dataclass(frozen=True)
class Job:
    """What the process is asked to do; ``path`` is what ``Contender.prepare`` returned."""

    contender: str
    kind: str
    path: str
    device: str
    dtype: str
    threads: int
    vocab_size: int
    workload: dict[str, Any]


@dataclass(frozen=True)
class Fresh:
    """What the process found."""

    load_s: float
    """Seconds of loading, with the imports it needs, plus the first whole call."""
    peak_bytes: int
    """CPU: peak resident memory of the process. GPU: see ``DeviceMemory.peak_bytes``."""


def measure_fresh(job: Job, timeout_s: float = 1800) -> Fresh:
    """Run ``job`` in a new process.

    Raises:
        RuntimeError: the process failed; the message ends with the last line it wrote.
    """
    command = [sys.executable, "-m", "fastgen.bench.fresh", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{job.contender} in a fresh process, exit {done.returncode}: {last}")
    return Fresh(**json.loads(done.stdout.splitlines()[-1]))


def _run(job: Job) -> Fresh:
    torch.set_num_threads(job.threads)
    workload = workload_from(job.workload)
    dtype: torch.dtype = getattr(torch, job.dtype)
    made = contenders(job.kind)[job.contender]
    contender = made(job.kind, job.device, dtype, job.vocab_size)
    inputs = contender.inputs(workload)  # also starts CUDA, whose context is nobody's memory
    memory = DeviceMemory() if job.device == "cuda" else None
    start = time.perf_counter()
    contender.load(job.path)
    timed_call(contender, inputs, workload)
    load_s = time.perf_counter() - start
    for _ in range(_STEADY_CALLS):
        timed_call(contender, inputs, workload)
    peak = memory.peak_bytes() if memory else _peak_resident_bytes(contender.process)
    contender.close()
    return Fresh(load_s, peak)


class DeviceMemory:
    """Peak GPU memory since construction: what torch allocated plus what others took meanwhile.

    torch counts exactly but only for itself; the driver counts everything but has no peak, so a
    thread samples it. Assumes that other processes' use of the GPU stays as it is.
    """

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._outside_before = self._outside_torch()
        self._outside_peak = self._outside_before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def peak_bytes(self) -> int:
        """Stop sampling and return torch's peak plus the peak growth outside of torch, in bytes."""
        self._stop.set()
        self._thread.join()
        torch.cuda.synchronize()
        self._outside_peak = max(self._outside_peak, self._outside_torch())
        return torch.cuda.max_memory_allocated() + self._outside_peak - self._outside_before

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._outside_peak = max(self._outside_peak, self._outside_torch())

    @staticmethod
    def _outside_torch() -> int:
        """Bytes in use on the device that torch's allocator does not hold."""
        while True:
            before = torch.cuda.memory_reserved()
            free, total = torch.cuda.mem_get_info()
            if torch.cuda.memory_reserved() == before:  # else torch grew between the two counts
                return total - free - before


def _peak_resident_bytes(process: int | None) -> int:
    """Peak resident set of a process; None: of this one."""
    status = Path(f"/proc/{process or 'self'}/status")
    if status.exists():
        # Not getrusage: on Linux its peak starts at that of the process this one was forked from.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes


if __name__ == "__main__":
    print(json.dumps(asdict(_run(Job(**json.loads(sys.argv[1]))))))
