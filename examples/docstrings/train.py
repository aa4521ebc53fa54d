"""Train the writer of docstrings: ten minutes on one CPU core.

python -m examples.docstrings.train --out FOLDER --minutes 10
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from examples.docstrings.data import END, PAD, VOCABULARY, docstrings, encode, is_held_out

LENGTH = 256  # bytes that the model sees
WARMUP = 0.05  # share of the run in which the learning rate rises
CHECKS = 10  # looks at the loss during the run
RECORDED = ("minutes", "steps", "batch_size", "lr", "seed")


def build_model() -> GPT2LMHeadModel:
    """A fresh model of 0.84 M parameters: 1.7 MB in bf16."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=END,
            eos_token_id=END,
            pad_token_id=PAD,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        )
    )


def windows(tokens: Tensor, size: int) -> Tensor:
    """Pieces of the stream of tokens, begun anywhere: int64 [size, LENGTH]."""
    if len(tokens) < LENGTH:
        raise ValueError(f"{len(tokens)} bytes of text: at least {LENGTH} make a window")
    starts = torch.randint(len(tokens) - LENGTH + 1, (size, 1))
    return tokens[starts + torch.arange(LENGTH)]


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine to a tenth; progress runs from 0 to 1."""
    falling = 0.55 + 0.45 * math.cos(math.pi * min(progress, 1.0))
    return peak * min(progress / WARMUP, falling)


def train(
    model: GPT2LMHeadModel, learn: Tensor, held_out: Tensor, options: argparse.Namespace
) -> int:
    """Train in place until the steps or minutes are over; returns how many steps it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    start, done, progress, checks = time.monotonic(), 0, 0.0, 1
    while progress < 1:
        optimizer.param_groups[0]["lr"] = learning_rate(progress, options.lr)
        rows = windows(learn, options.batch_size)
        loss = model.train()(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done, elapsed = done + 1, time.monotonic() - start
        progress = done / options.steps if options.steps else elapsed / (60 * options.minutes)
        if progress >= checks / CHECKS:
            checks += 1
            bits = bits_per_byte(model, held_out, 32)
            print(f"step {done:,} ({elapsed:.0f} s)  held out: {bits:.3f} bits a byte", flush=True)
    return done


@torch.no_grad()
def bits_per_byte(model: GPT2LMHeadModel, tokens: Tensor, most: int = 10**9) -> float:
    """Mean bits that the model needs for a byte, over windows side by side, at most ``most``."""
    count = min(len(tokens) // LENGTH, most)
    losses = [
        model.eval()(input_ids=rows, labels=rows).loss.item() * len(rows)
        for rows in tokens[: count * LENGTH].view(count, LENGTH).split(32)
    ]
    return sum(losses) / count / math.log(2)


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write bf16 weights (half the bytes, the same values in every dtype) that load as fp32."""
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": PAD}
    model.generation_config = GenerationConfig(**ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    model.config.dtype = torch.float32  # what from_pretrained makes of them unless told otherwise
    model.config.save_pretrained(folder)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the writer of docstrings.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--library", type=Path, help="folder of Python files (else this Python's)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=10.0, help="training time")
    budget.add_argument("--steps", type=int, help="train so many steps, however long they take")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of 256 bytes in a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, save, measure the saved checkpoint, and write the figures beside it."""
    options = parse()
    torch.manual_seed(options.seed)
    texts = docstrings(options.library)
    learn, held_out = (
        torch.tensor(encode(text for text in texts if is_held_out(text) is side))
        for side in (False, True)
    )
    model = build_model()
    print(f"{model.num_parameters():,} parameters, {len(learn):,} bytes to learn", flush=True)
    steps = train(model, learn, held_out, options)
    save(model, options.out)
    saved = GPT2LMHeadModel.from_pretrained(options.out)
    figures = {
        "held_out_bits_per_byte": bits_per_byte(saved, held_out),
        "held_out_bytes": len(held_out),
        "training_bytes": len(learn),
        "options": {key: getattr(options, key) for key in RECORDED} | {"steps_done": steps},
        "device": f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (options.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"saved, held out: {figures['held_out_bits_per_byte']:.3f} bits a byte")


if __name__ == "__main__":
    main()
