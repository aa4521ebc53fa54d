"""Thousands of mixed ``generate`` calls in one process: memory must stay flat, answers the same.

    python benchmarks/soak.py --calls 10000 --device cuda --shape t5-small --dtype float16

Prints device and host memory every 500 calls. Fails if either grows after warm-up by more than
``--allow-mb``, or if the first call no longer gives the tokens it gave at first.
"""

import argparse
import gc
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from fastgen import FastT5ForConditionalGeneration
from fastgen.bench.shapes import SHAPES, write_random_checkpoint

MB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes in use after some calls."""

    calls: int
    allocated: int
    """On the device, by torch."""
    device: int
    """On the device, by anything."""
    host: int
    """Resident set of this process."""

    @classmethod
    def now(cls, calls: int, device: torch.device) -> "Memory":
        gc.collect()
        allocated = used = 0
        if device.type == "cuda":
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            allocated, used = torch.cuda.memory_allocated(), total - free
        return cls(calls, allocated, used, psutil.Process().memory_info().rss)


class Counter(BaseStreamer):
    """A streamer that counts what it is given."""

    tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.numel()

    def end(self) -> None:
        pass


def favour_even(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor as a user may write one."""
    return scores + (torch.arange(scores.shape[-1], device=scores.device) % 2 == 0)


def mixed_call(number: int, vocabulary: int, device: torch.device) -> dict[str, Any]:
    """Arguments of call ``number``: shapes, modes and options at random, the same in every run."""
    draw = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    rows, length = draw.choice([1, 1, 2, 3, 8]), draw.choice([1, 9, 30, 64, 100])
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    call: dict[str, Any] = {"input_ids": ids.to(device)}
    call["max_new_tokens"] = draw.choice([1, 5, 16, 40, 80])
    if draw.random() < 0.3:
        keep = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
        call["attention_mask"] = keep.long().to(device)
    beams = draw.choice([1, 1, 1, 2, 4])
    if beams > 1:
        call |= {"num_beams": beams, "early_stopping": draw.choice([True, False, "never"])}
        call["num_return_sequences"] = draw.choice([1, beams])
    if draw.random() < 0.4:
        call |= {"do_sample": True, "temperature": draw.choice([0.7, 1.0, 1.4])}
        call |= {"top_k": draw.choice([0, 50]), "top_p": draw.choice([0.9, 1.0])}
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": call["max_new_tokens"]},
        {"return_dict_in_generate": True, "output_scores": True},
        {"logits_processor": LogitsProcessorList([favour_even])},
        {"eos_token_id": [1, *range(50, 60)]},
        {"streamer": Counter()} if beams == 1 else {"length_penalty": 2.0},
    ]
    for option in draw.sample(options, draw.choice([0, 0, 1, 2])):
        call |= option
    return call


def soak(model: Any, calls: int, every: int, warm_up: int) -> tuple[list[Memory], bool]:
    """Make the calls; gives the readings after warm-up, and whether the first answer holds."""

    def answer(number: int) -> Any:
        torch.manual_seed(number)
        return model.generate(**mixed_call(number, model.config.vocab_size, model.device))

    def tokens(number: int) -> list[list[int]]:
        output = answer(number)
        return (output if torch.is_tensor(output) else output.sequences).tolist()

    readings: list[Memory] = []
    first, same, start = tokens(0), True, time.perf_counter()
    for number in range(1, calls + 1):
        answer(number)
        if number % every == 0 or number == calls:
            same = same and tokens(0) == first
            reading = Memory.now(number, model.device)
            milliseconds = 1e3 * (time.perf_counter() - start) / number
            print(
                f"{number:6d} calls  torch {reading.allocated / MB:8.1f} MB  device "
                f"{reading.device / MB:8.1f} MB  host {reading.host / MB:8.1f} MB  "
                f"{milliseconds:6.1f} ms/call  {'same' if same else 'OTHER'} tokens",
                flush=True,
            )
            if number >= warm_up:
                readings.append(reading)
    return readings, same


def growth(readings: list[Memory], name: str) -> float:
    """How far the last reading lies above the first after warm-up, in MB."""
    return (getattr(readings[-1], name) - getattr(readings[0], name)) / MB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=500, help="calls between readings")
    parser.add_argument("--warm-up", type=int, help="calls before growth counts (a quarter)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shape", default="t5-tiny", choices=SHAPES)
    parser.add_argument("--allow-mb", type=float, default=64.0, help="growth that is forgiven")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(options.shape, Path(folder), dtype=dtype, device=options.device)
        model = FastT5ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    model = model.to(options.device).eval()
    warm_up = options.calls // 4 if options.warm_up is None else options.warm_up
    readings, same = soak(model, options.calls, options.every, warm_up)
    grown = {name: growth(readings, name) for name in ("allocated", "device", "host")}
    print("growth after warm-up: " + ", ".join(f"{n} {mb:+.1f} MB" for n, mb in grown.items()))
    flat = max(grown.values()) <= options.allow_mb
    if not flat:
        print(f"memory grew by more than {options.allow_mb} MB", file=sys.stderr)
    if not same:
        print("the first call gives other tokens than at first", file=sys.stderr)
    return 0 if flat and same else 1


if __name__ == "__main__":
    sys.exit(main())
