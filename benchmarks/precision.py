"""What each precision costs and gives on this machine's CPU, as a Markdown table.

    python -m benchmarks.precision [--models pronounce docstrings t5-small@random] [--threads 2]

Each row runs in a process of its own: milliseconds per token (greedy, one sequence, median), the
memory that the model takes once engines have packed their weights, and accuracy against stock fp32.
The demo checkpoints are asked about held-out data; a random model about random tokens.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import examples.docstrings.demo as docstrings
import examples.pronounce.inference as pronounce
import fastgen
from examples.docstrings.data import docstrings as texts
from examples.docstrings.data import encode, is_held_out
from examples.pronounce.data import held_out_words
from fastgen.bench.shapes import SUFFIX, shape_of, write_random_checkpoint

#: What a row is called, and the engine options that ask for it; another precision is a line here.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"weights": "int8", "keep_torch_weights": False},
    "int4": {"weights": "int4", "keep_torch_weights": False},
}
MODELS = ("pronounce", "docstrings", "t5-small@random")
ROWS = 64
CALLS = 7


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    ms: float
    """Milliseconds per token of a greedy call, with its first token."""
    megabytes: float
    same_tokens: float
    """Share of tokens whose most likely successor is the one of stock fp32, given the same text."""
    logit_error: float
    """Of all logits, the norm of the difference to stock fp32's by the norm of these."""


def folder_of(model: str, scratch: Path) -> Path:
    """Where a checkpoint lies; one of a shape is drawn."""
    demos = {"pronounce": pronounce.CHECKPOINT, "docstrings": docstrings.CHECKPOINT}
    if model in demos:
        return demos[model]
    write_random_checkpoint(model.removesuffix(SUFFIX), scratch, dtype=torch.float32, device="cpu")
    return scratch


def source(model: str) -> dict[str, torch.Tensor]:
    """Held-out rows, or random ones: token ids and a mask."""
    if model == "pronounce":
        words = held_out_words()
        words = [word.lower() for word in words[:: len(words) // ROWS][:ROWS]]
        return dict(pronounce.tokenizer()(words, padding=True, return_tensors="pt"))
    if model == "docstrings":
        tokens = encode(text for text in texts() if is_held_out(text))
        ids = torch.tensor(tokens[: ROWS * 96]).view(-1, 96)
    else:
        ids = torch.randint(3, 32_000, (8, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def memory() -> float:
    """Megabytes of this process that no file backs."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def greedy(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Milliseconds per token of one row, and the tokens."""
    one = {name: values[:1, :32] for name, values in batch.items()}
    seconds, rows = [], torch.empty(0)
    for _ in range(CALLS):
        start = time.perf_counter()
        rows = model.generate(**one, do_sample=False, num_beams=1, **_LENGTH)
        seconds.append(time.perf_counter() - start)
    new = rows.shape[1] - (1 if model.config.is_encoder_decoder else one["input_ids"].shape[1])
    return 1000 * statistics.median(seconds) / new, rows


_LENGTH = {"min_new_tokens": 64, "max_new_tokens": 64}


@torch.inference_mode()
def measure(name: str, precision: str, threads: int) -> Row:
    """One row, in this process."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder_of(name, Path(scratch))
        config = transformers.AutoConfig.from_pretrained(folder)
        stock_class = (
            shape_of(name.removesuffix(SUFFIX)).stock
            if name.endswith(SUFFIX)
            else config.architectures[0]
        )
        batch = source(name)
        stock = getattr(transformers, stock_class).from_pretrained(folder).eval()
        if config.is_encoder_decoder:
            rows = stock.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=24)
            batch_forced = {**batch, "decoder_input_ids": rows}
        else:
            batch_forced = batch
        expected = stock(**batch_forced).logits
        del stock
        kind = getattr(fastgen, f"Fast{stock_class}")
        before = memory()
        options = {"disk_cache": False, **PRECISIONS[precision]}
        model = kind.from_pretrained(folder, engine_options=options).eval()
        greedy(model, batch)
        taken = memory() - before
        ms, _ = greedy(model, batch)
        found = model(**batch_forced).logits
    seen = batch_forced.get("decoder_input_ids", batch["input_ids"]) != config.pad_token_id
    found, expected = found[seen], expected[seen]
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    error = (found - expected).norm() / expected.norm()
    return Row(ms, taken, float(same), float(error))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", action="store_true", help="the first row, as JSON")
    options = parser.parse_args()
    if options.one:
        row = measure(options.models[0], options.precisions[0], options.threads)
        print(json.dumps(vars(row)))
        return
    print("| model | precision | ms per token | memory, MB | same tokens | logit error |")
    print("|---|---|---|---|---|---|")
    for model in options.models:
        for precision in options.precisions:
            command = [sys.executable, "-m", "benchmarks.precision", "--one"]
            command += ["--models", model, "--precisions", precision]
            command += ["--threads", str(options.threads)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = Row(**json.loads(text.splitlines()[-1]))
            parts = f"{row.ms:.2f} | {row.megabytes:.0f} | {row.same_tokens:.1%}"
            print(f"| {model} | {precision} | {parts} | {row.logit_error:.2%} |", flush=True)


if __name__ == "__main__":
    main()
