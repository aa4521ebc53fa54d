"""What a first and a second start with weights of fewer bits cost, as a Markdown table.

    python -m benchmarks.starts [--models t5-base t5-large] [--kinds full int8 int4] [--threads 2]

Shapes with random weights, on the CPU, without torch's copy of the weights; each start is a process
of its own, over one folder of the engine cache. "ready" are the seconds in which engines are
built; of a start before it (imports, the checkpoint) nothing is counted, in time and in memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import fastgen
from benchmarks.precision import memory
from fastgen.bench.shapes import shape_of, write_random_checkpoint
from fastgen.engine_cache import EngineCache

SMALLEST = {"T5": "t5-tiny", "GPT2": "gpt2-tiny", "Bart": "bart-tiny"}
"""By how a stock class's name begins: a shape whose engine brings in what no weights are."""


@dataclass(frozen=True)
class Start:
    """One start; memory in megabytes."""

    ready: float
    peak: float
    """The most memory that no file backed."""
    resting: float
    """Such memory once engines are ready, torch's copy is let go and tokens were generated."""
    mapped: float
    """Memory that files back, beyond what there was before the checkpoint was mapped."""
    quantised: float
    """Of the values and scales of all weights."""


def status(field: str) -> float:
    """Megabytes of this process, by a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


class Peak(threading.Thread):
    """Looks every few milliseconds at the memory that no file backs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._done = 0.0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, status("RssAnon"))

    def end(self) -> float:
        """The most there was."""
        self._done.set()
        self.join()
        return self.most


def model_of(folder: Path, stock: str, kind: str, cache: Path) -> Any:
    """A Fast model of a checkpoint, with weights of that kind and no engine yet."""
    options = {"weights": kind, "keep_torch_weights": False, "cache_dir": str(cache)}
    fast = getattr(fastgen, f"Fast{stock}")
    return fast.from_pretrained(folder, engine_options=options).eval()


@torch.inference_mode()
def measure(folder: Path, kind: str, threads: int) -> Start:
    """One start, in this process.

    Args:
        folder: has a checkpoint in ``model`` and one of the smallest shape in ``smallest``; the
            engine cache is ``cache``.
    """
    torch.set_num_threads(threads)
    stock = transformers.AutoConfig.from_pretrained(folder / "model").architectures[0]
    ids = torch.randint(3, 100, (1, 32), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        small = model_of(folder / "smallest", stock, kind, Path(scratch))
        small.generate(ids, max_new_tokens=4)
    files = status("RssFile")
    model = model_of(folder / "model", stock, kind, folder / "cache")
    before, peak = memory("cpu"), Peak()
    peak.start()
    start = time.perf_counter()
    model.compile_engine()
    ready = time.perf_counter() - start
    model.generate(ids, max_new_tokens=64, min_new_tokens=64)
    most, resting = peak.end() - before, memory("cpu") - before
    entries = EngineCache(folder / "cache").entries()
    quantised = sum(e.size for e in entries if e.title.endswith(" weights")) / 2**20
    return Start(ready, most, resting, status("RssFile") - files, quantised)


def row(model: str, kind: str, threads: int) -> str:
    """The table's row of a model: two starts over a folder of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, stock = Path(scratch), shape_of(model).stock
        smallest = next(name for prefix, name in SMALLEST.items() if stock.startswith(prefix))
        for name, shape in (("model", model), ("smallest", smallest)):
            write_random_checkpoint(shape, folder / name, dtype=torch.float32, device="cpu")
        command = [sys.executable, "-m", "benchmarks.starts", "--one", str(folder)]
        command += ["--kinds", kind, "--threads", str(threads)]
        starts = []
        for _ in range(2):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            starts.append(Start(**json.loads(done.stdout.splitlines()[-1])))
    first, second = starts
    ready, peak = f"{first.ready:.1f} / {second.ready:.1f}", f"{first.peak:.0f} / {second.peak:.0f}"
    quantised, resting = "-", f"{second.resting:.0f}"
    if second.quantised:
        quantised = f"{second.quantised:.0f}"
        resting += f" ({100 * (second.resting / second.quantised - 1):+.0f} %)"
    found = f"{quantised} | {peak} | {resting} | {second.mapped:.0f}"
    return f"| {model} | `{kind}` | {ready} | {found} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=("t5-base", "t5-large"), metavar="SHAPE")
    parser.add_argument("--kinds", nargs="+", default=("int8", "int4"), metavar="KIND")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", type=Path, metavar="FOLDER", help="one start there, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(vars(measure(options.one, options.kinds[0], options.threads))))
        return
    print("| shape | `weights` | ready, s: first / second start | quantised, MB", end=" ")
    print("| peak, MB | resting, MB | mapped, MB |\n" + 7 * "|---" + "|")
    for model in options.models:
        for kind in options.kinds:
            print(row(model, kind, options.threads), flush=True)


if __name__ == "__main__":
    main()
