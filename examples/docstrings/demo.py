"""Continue a prompt with stock GPT-2 and with fastgen, side by side on the CPU.

python -m examples.docstrings.demo [PROMPT]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import GPT2LMHeadModel, PreTrainedModel

import fastgen
from examples.docstrings.data import END, decode, encode
from fastgen import FastGPT2LMHeadModel

CHECKPOINT = Path(__file__).parent / "checkpoint"
PROMPT = "Return the "
WAYS: dict[str, dict[str, Any]] = {
    "greedy, no 10 bytes twice": {"no_repeat_ngram_size": 10},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 40},
    "4 beams": {"num_beams": 4},
}


def load(checkpoint: Path, *, fast: bool) -> PreTrainedModel:
    """The checkpoint in the stock class, or in fastgen's; fp32, in evaluation mode."""
    kind = FastGPT2LMHeadModel if fast else GPT2LMHeadModel
    return kind.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.inference_mode()
def continued(model: PreTrainedModel, prompt: str, new: int, **way: Any) -> list[int]:
    """Up to ``new`` tokens that follow a prompt, without the end; the same seed each time."""
    torch.manual_seed(0)
    ids = torch.tensor([encode([prompt])])
    row = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **way)[0]
    return [token for token in row[ids.shape[1] :].tolist() if token != END]


def measure(
    models: dict[str, PreTrainedModel], prompt: str, new: int, rounds: int, way: dict[str, Any]
) -> dict[str, float]:
    """Median seconds of each model's call, taking turns so that a busy machine hits both."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            continued(model, prompt, new, **way)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def parse() -> argparse.Namespace:
    """The command line; a prompt is ASCII, and leaves room for what follows it."""
    parser = argparse.ArgumentParser(description="Continue a docstring with GPT-2 and fastgen.")
    parser.add_argument("prompt", nargs="?", default=PROMPT, help=f"default: {PROMPT!r}")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens: a byte each")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not options.prompt.isascii() or "\0" in options.prompt:
        parser.error(f"cannot read {options.prompt!r}: give ASCII characters")
    if not 0 < options.tokens <= 255 - len(options.prompt):
        parser.error(
            f"--tokens {options.tokens} behind a prompt of {len(options.prompt)} characters: the "
            "model knows 255 positions in all; give at least 1 and fewer"
        )
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: give at least 1")
    return options


def main() -> int:
    """Continue, compare, measure; 1 if any token differs."""
    options = parse()
    models = {
        name: load(options.checkpoint, fast=name == "fastgen") for name in ("stock", "fastgen")
    }
    console, alike = Console(highlight=False), True
    table = Table(title=f"Time (median of {options.rounds} alternating rounds)")
    table.add_column("GPT-2, up to " + f"{options.tokens} tokens")
    for title in ("same tokens", "stock", "fastgen", "speed-up"):
        table.add_column(title, justify="right")
    for name, way in WAYS.items():
        found = {
            which: continued(model, options.prompt, options.tokens, **way)
            for which, model in models.items()
        }
        same = found["stock"] == found["fastgen"]
        alike &= same
        console.print(f"[bold]{name}[/bold]")
        console.print(options.prompt + decode(found["fastgen"]), markup=False)
        seconds = measure(models, options.prompt, options.tokens, options.rounds, way)
        stock, fast = seconds["stock"], seconds["fastgen"]
        times = f"{stock * 1e3:.1f} ms", f"{fast * 1e3:.1f} ms", f"{stock / fast:.2f}x"
        table.add_row(name, "yes" if same else "NO", *times)
    console.print(table)
    console.print(
        f"CPU, {torch.get_num_threads()} threads, fp32, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, fastgen {fastgen.__version__}"
    )
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
