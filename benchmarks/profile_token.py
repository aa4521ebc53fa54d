"""What one generated token costs: device time by kernel, host time by function.

python benchmarks/profile_token.py t5-small@random --dtype bfloat16 (or gpt2@random, say)
"""

import cProfile
import io
import pstats
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

import fastgen
from fastgen.bench.shapes import kind_of, write_random_checkpoint

TOKENS = 64
AUTO = {"seq2seq": "FastAutoModelForSeq2SeqLM", "causal": "FastAutoModelForCausalLM"}


def main(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or NAME@random.")],
    dtype: str = "bfloat16",
    batch: int = 1,
    prompt_tokens: int = 32,
    beams: int = 1,
) -> None:
    """Print the two profiles of a whole ``generate`` call, per token."""
    kind = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as folder:
        source = model
        if model.endswith("@random"):
            name, source = model.removesuffix("@random"), folder
            write_random_checkpoint(name, Path(folder), dtype=kind, device="cuda")
        auto = getattr(fastgen, AUTO[kind_of(model)])
        fast = auto.from_pretrained(source, dtype=kind)
    fast = fast.to("cuda").eval()
    fast.generation_config.eos_token_id = fast.config.vocab_size  # never chosen: exact length
    ids = torch.randint(2, fast.config.vocab_size, (batch, prompt_tokens), device="cuda")

    def call() -> None:
        mask = torch.ones_like(ids)
        fast.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, num_beams=beams)
        torch.cuda.synchronize()

    for _ in range(3):
        call()
    start = time.perf_counter()
    for _ in range(10):
        call()
    per_token = (time.perf_counter() - start) / 10 / TOKENS * 1e6
    print(
        f"{model} {dtype}, batch {batch} x {prompt_tokens}, {beams} beams: {per_token:.1f} us/token"
    )
    _device(call)
    _host(call)


def _device(call: Any) -> None:
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in recorded.events():
        kernels[event.name.split("<")[0].split("(")[0][:60]].append(event.device_time_total)
    # fastgen's own kernels start before their predecessors end, and wait: their times overlap
    print("\ndevice, us per token | launches per token | us each | kernel")
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:16]:
        total, count = sum(times), len(times)
        print(f"{total / TOKENS:8.2f} {count / TOKENS:8.2f} {total / count:8.2f}  {name}")
    print(f"{sum(map(sum, kernels.values())) / TOKENS:8.2f} in all")


def _host(call: Any) -> None:
    recorded = cProfile.Profile()
    recorded.enable()
    call()
    recorded.disable()
    text = io.StringIO()
    pstats.Stats(recorded, stream=text).sort_stats("tottime").print_stats(14)
    print("\nhost, one call of", TOKENS, "tokens")
    print("\n".join(text.getvalue().splitlines()[2:]))


if __name__ == "__main__":
    typer.run(main)
