"""What a call of ``generate`` takes before its first token, by whether its like came before.

    python -m benchmarks.first_token bart-large gpt2 t5-large --device cuda --dtype bfloat16

Random weights of published shapes, greedy, one prompt of 32 tokens; medians in milliseconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fastgen
from fastgen.bench.shapes import shape_config, shape_of


def build(name: str, device: str, dtype: torch.dtype) -> Any:
    """The Fast model of a shape, with weights as its class draws them."""
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(fastgen, f"Fast{shape_of(name).stock}")(shape_config(name))
    return model.to(dtype).eval()


def median(call: Callable[[], Any], times: int) -> float:
    """Milliseconds until the tokens are there."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call().tolist()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def row(name: str, device: str, dtype: torch.dtype, times: int) -> str:
    """One line of the table."""
    model = build(name, device, dtype)
    end = model.config.vocab_size  # no token: none ends early
    ids = torch.randint(5, end - 5, (1, 32), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    given |= {"eos_token_id": end, "do_sample": False, "num_beams": 1}

    def call(new: int) -> torch.Tensor:
        tokens: torch.Tensor = model.generate(**given, max_new_tokens=new)
        return tokens

    def unknown() -> torch.Tensor:
        model._engine.calls.clear()
        return call(1)

    for new in (64, 1, 64, 1):
        call(new)
    parts = [median(unknown, times), median(lambda: call(1), times)]
    whole = median(lambda: call(64), max(1, times // 4))
    parts += [whole / 64, (whole - parts[1]) / 63]
    return f"| {name} | {' | '.join(f'{part:.3f}' for part in parts)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", nargs="+", help="as of fastgen bench, without @random")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--times", type=int, default=40)
    given = parser.parse_args()
    print("| | first token, a new call | first token, a known one | a token of 64 | each further |")
    print("|---|---|---|---|---|")
    for name in given.shapes:
        print(row(name, given.device, getattr(torch, given.dtype), given.times), flush=True)


if __name__ == "__main__":
    main()
