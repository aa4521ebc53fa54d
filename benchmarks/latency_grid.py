"""Whole ``generate`` calls of fastgen alone, over shapes and workloads: minutes on one GPU.

python benchmarks/latency_grid.py t5-small t5-base t5-large t5-3b --dtype bfloat16

``fastgen bench --grid`` measures the same workloads beside other libraries, and takes longer.
"""

import gc
import statistics
import time
from typing import Annotated

import torch
import typer

import fastgen
from fastgen.bench.shapes import shape_config, shape_of
from fastgen.bench.workload import standard_grid

NEW_TOKENS, WARM_UPS, CALLS = 64, 3, 7


def main(
    shapes: Annotated[list[str], typer.Argument(help="Shape names such as t5-small or gpt2.")],
    dtype: str = "bfloat16",
) -> None:
    """Print milliseconds per token (call / tokens, median) and time to first token."""
    for shape in shapes:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = getattr(fastgen, f"Fast{shape_of(shape).stock}")(shape_config(shape)).eval()
        model = model.to(getattr(torch, dtype))
        model.generation_config.eos_token_id = model.config.vocab_size  # never chosen
        for workload in standard_grid(NEW_TOKENS):
            ids = workload.prompts(model.config.vocab_size).to("cuda")
            arguments = {"num_beams": workload.beams, "do_sample": workload.sample}
            arguments["attention_mask"] = torch.ones_like(ids)
            if workload.sample:
                arguments |= {"top_k": 50, "top_p": 0.9}
            whole, first = (
                _median_ms(model, ids, max_new_tokens=tokens, **arguments)
                for tokens in (NEW_TOKENS, 1)
            )
            print(
                f"{shape:9} batch {workload.batch:2}, prompt {workload.prompt_tokens:3}, "
                f"{workload.beams} beams{', sampled' * workload.sample}: "
                f"{whole / NEW_TOKENS:.4f} ms/token, first token {first:.2f} ms",
                flush=True,
            )
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _median_ms(model: torch.nn.Module, ids: torch.Tensor, **arguments: object) -> float:
    times = []
    for _ in range(WARM_UPS + CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, **arguments)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[WARM_UPS:])


if __name__ == "__main__":
    typer.run(main)
