"""Pronounce words with stock T5 and with fastgen, side by side on the CPU.

python -m examples.pronounce.demo [WORD ...]
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import fastgen
from examples.pronounce.data import MAX_LENGTH, is_held_out
from examples.pronounce.inference import CHECKPOINT, generate_tokens, load, to_phonemes

# Held out of training, every word.
SENTENCE = "The sleepy engineer sought midnight lightning, breezes, zoology, laughter, a fox"

Tokens = list[list[int]]


def one_by_one(model: PreTrainedModel, words: list[str]) -> Tokens:
    """One `generate` call per word: batch 1, where latency counts."""
    return [generate_tokens(model, [word])[0] for word in words]


def measure(
    run: Callable[[PreTrainedModel], Tokens], models: dict[str, PreTrainedModel], rounds: int
) -> dict[str, float]:
    """Median seconds of `run` for each model, taking turns so that a busy machine hits both."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        run(model)  # warm-up: fastgen builds its engine at the first call
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            run(model)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def pronunciations(words: list[str], tokens: dict[str, Tokens]) -> Table:
    """Word, phonemes, whether training saw the word, whether both classes agree."""
    table = Table(title="Pronunciations")
    for title in ("word", "ARPAbet", "in training", "same tokens"):
        table.add_column(title)
    for i, word in enumerate(words):
        same = tokens["stock"][i] == tokens["fastgen"][i]
        table.add_row(
            word,
            to_phonemes([tokens["fastgen"][i]])[0],
            "no: held out" if is_held_out(word) else "if listed",
            "yes" if same else f"NO: stock {to_phonemes([tokens['stock'][i]])[0]}",
        )
    return table


def speed(timings: dict[str, dict[str, float]], rounds: int) -> Table:
    """Milliseconds of each job in each class, and the ratio."""
    table = Table(title=f"Time (median of {rounds} alternating rounds)")
    table.add_column("job")
    for title in ("stock", "fastgen", "speed-up"):
        table.add_column(title, justify="right")
    for job, seconds in timings.items():
        stock, fast = seconds["stock"], seconds["fastgen"]
        table.add_row(job, f"{stock * 1e3:.1f} ms", f"{fast * 1e3:.1f} ms", f"{stock / fast:.2f}x")
    return table


def parse() -> argparse.Namespace:
    """The command line; words come without punctuation."""
    parser = argparse.ArgumentParser(description="Pronounce words with stock T5 and fastgen.")
    parser.add_argument("words", nargs="*", help=f"English words (default: {SENTENCE!r})")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    text = " ".join(options.words) or SENTENCE
    options.words = re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())
    too_long = [word for word in options.words if len(word) > MAX_LENGTH]
    if not options.words or too_long:
        parser.error(
            f"cannot pronounce {too_long or text!r}: give words of the letters a to z, "
            f"at most {MAX_LENGTH} each"
        )
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: give at least 1")
    return options


def main() -> int:
    """Pronounce, compare, measure; 1 if any token differs."""
    options = parse()
    words: list[str] = options.words
    models = {
        "stock": load(options.checkpoint, fast=False),
        "fastgen": load(options.checkpoint, fast=True),
    }
    tokens = {name: one_by_one(model, words) for name, model in models.items()}
    console = Console()
    console.print(pronunciations(words, tokens))
    count = len(words)
    timings = {
        f"{count} words, one call each": measure(
            lambda model: one_by_one(model, words), models, options.rounds
        ),
        f"{count} words, one call": measure(
            lambda model: generate_tokens(model, words), models, options.rounds
        ),
    }
    console.print(speed(timings, options.rounds))
    console.print(
        f"CPU, {torch.get_num_threads()} threads, fp32, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, fastgen {fastgen.__version__}"
    )
    return 0 if tokens["stock"] == tokens["fastgen"] else 1


if __name__ == "__main__":
    sys.exit(main())
