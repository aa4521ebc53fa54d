"""What the launches of a decoder's fused step cost, beside the bytes that they must move.

    python benchmarks/kernels.py t5-large@random --batch 1 --beams 4 --prompt-tokens 32
    python benchmarks/kernels.py t5-3b@random --weights int8

A line for each kind of launch (an instantiation of a kernel, or a product of cuBLAS): how many a
step has, the bytes of one, its time among its like (those of all layers, one after the other, as a
captured graph), and the share of the bandwidth of a copy. Below, their sum beside the whole step,
in which launches overlap, and how far its logits are from those of ONNX Runtime's kernels.
"""

import ctypes
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer

import fastgen
from fastgen.bench.floor import measure_machine
from fastgen.bench.shapes import SUFFIX, shape_config, shape_of
from fastgen.engines.nvrtc import Launch

REPLAYS = 50
_INSTANTIATION = re.compile(r" (\w+)\(const __grid_constant__ .*\{ (.*)\(args\); \}")
"""A kernel's name in the recorded source, and the template that it is of."""


@dataclass
class Kind:
    """Launches of one instantiation, or of one size of product."""

    bytes: int = 0
    """Of all of them."""
    runs: list[Callable[[int], None]] = field(default_factory=list)


def kinds(ops: Any, runs: Iterable[Callable[[int], None]]) -> dict[str, Kind]:
    """The kinds of a recorded step's launches, in the order of their first.

    Args:
        ops: what recorded them.
        runs: its launches, each ready to queue its work on a stream.
    """
    held = [ops._tensors, ops._parameters, ops._scratch, ops.made]
    memory = {tensor.data_ptr(): tensor for tensors in held for tensor in tensors.values()}
    bodies = dict(_INSTANTIATION.findall(ops.source()))
    found: dict[str, Kind] = {}
    for launch, run in zip(ops.launches, runs, strict=True):
        if isinstance(launch, Launch):
            name = bodies[launch.kernel]
            moved = kernel_bytes(launch.arguments, name, memory)
        else:
            name, moved = torch_bytes(launch)
        kind = found.setdefault(name, Kind())
        kind.bytes += moved
        kind.runs.append(run)
    return found


def kernel_bytes(args: ctypes.Structure, body: str, memory: dict[int, torch.Tensor]) -> int:
    """Bytes that a kernel must read and write: each tensor that it has a pointer to, once. But of a
    table of embeddings or angles a row for each token, and of KV slots, and what belongs to them,
    those that are filled; what a product is added to is read and written."""
    tensors = {name: memory[address] for name, address in pointers(args)}
    rows, filled = (tensors["ids"].numel() if "ids" in tensors else 0), 1.0
    if "first_slot" in tensors:  # self-attention, which appends to the slots
        slots, queries = tensors["slot_positions"].shape[-1], tensors["query_positions"].shape[0]
        filled = (int(tensors["first_slot"].max()) + queries) / slots
    total, seen = 0.0, set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        if rows and name in ("weight", "places"):
            total += rows * tensor[0].nbytes
        elif name == "turn.angles":
            total += tensor[0].nbytes * tensors["query_positions"].shape[0]
        elif name in ("key", "value", "mask", "slot_positions"):
            total += tensor.nbytes * filled
        else:
            total += tensor.nbytes * (2 if name == "y" and "ADD" in body else 1)
    if "first_slot" in tensors:
        total += 2 * len(tensors["y"]) * tensors["key"][0, 0].nbytes  # the new keys and values
    return round(total)


def pointers(args: ctypes.Structure) -> Iterator[tuple[str, int]]:
    """Names and addresses of the tensors in a kernel's parameters."""
    for name, *_ in args._fields_:
        value = getattr(args, name)
        if isinstance(value, ctypes.Structure):
            yield from ((f"{name}.{inner}", address) for inner, address in pointers(value))
        elif isinstance(value, ctypes.Array):
            yield from ((f"{name}.{i}", address) for i, address in enumerate(value) if address)
        elif value and dict(args._fields_)[name] is ctypes.c_void_p:
            yield name, value


def torch_bytes(launch: Callable[[int], None]) -> tuple[str, int]:
    """Name and bytes of a product that torch queues: the tensors that it holds, once each."""
    held = inspect.getclosurevars(launch).nonlocals
    tensors = {t.data_ptr(): t for t in held.values() if isinstance(t, torch.Tensor)}
    x, y = held["x"], held["y"]
    moved = sum(tensor.nbytes for tensor in tensors.values())
    added = bool(held.get("beta"))
    name = f"cuBLAS<{x.shape[-1]}, {y.shape[-1]}, {'ADD' if added else 'STORE'}>"
    return name, moved + (y.nbytes if added else 0)


def seconds(decoder: Any, runs: Iterable[Callable[[int], None]]) -> float:
    """Seconds of these launches, replayed as one graph that the decoder captures."""
    launches = list(runs)

    def queue() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for run in launches:
            run(stream)

    replay = decoder._captured(queue)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(REPLAYS):
        replay()
    begin.record()
    for _ in range(REPLAYS):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPLAYS


@torch.no_grad()
def main(
    shape: Annotated[str, typer.Argument(help="NAME@random, of a model that generates.")],
    dtype: str = "bfloat16",
    batch: int = 1,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    beams: int = 1,
    weights: str = "full",
) -> None:
    """Print the launches of the last step of such a ``generate`` call."""
    name = shape.removesuffix(SUFFIX)
    config = shape_config(name)
    torch.manual_seed(0)
    with torch.device("cuda"):
        fast = getattr(fastgen, f"Fast{shape_of(name).stock}")
        model = fast._from_config(config, dtype=getattr(torch, dtype)).eval()
        ids = torch.randint(3, config.vocab_size, (batch, prompt_tokens))
    model.engine_options = {"weights": weights}
    size = {"max_new_tokens": new_tokens, "eos_token_id": config.vocab_size, "num_beams": beams}
    model.generate(ids, attention_mask=torch.ones_like(ids), **size)
    print(f"{shape} {dtype}, weights: {weights}")
    print_launches(model, prompt_tokens, new_tokens)


def print_launches(model: Any, prompt_tokens: int, new_tokens: int) -> None:
    """The table, of a model whose last ``generate`` call was of that size."""
    decoder = model._current_engine()
    if decoder.fused is None:
        raise SystemExit("no fused kernels serve this model here: see `fastgen doctor`")
    bucket = decoder.pool.idle()[-1]
    peak = measure_machine("cuda", model.dtype).bytes_per_s
    with decoder.turn():
        bucket.seek((1 if decoder.shape.source else prompt_tokens) + new_tokens - 2)  # the last
        binding = decoder.fused.bind(bucket.tensors)
        found = kinds(binding._keep, binding._launches)
        print(f"{tuple(bucket.size)}: copies at {peak / 1e9:,.0f} GB/s")
        print(f"{'launches':>8} {'KiB each':>10} {'us each':>8} {'GB/s':>7} {'share':>6}  kind")
        total, everything = 0.0, sum(kind.bytes for kind in found.values())
        for body, kind in found.items():
            took = seconds(decoder, kind.runs)
            total += took
            _line(len(kind.runs), kind.bytes, took, peak, body)
        _line(1, everything, total, peak, "their sum")
        _line(1, everything, seconds(decoder, binding._launches), peak, "the whole step")
        _compare(decoder, bucket, binding)


def _line(count: int, moved: int, took: float, peak: float, name: str) -> None:
    rate = moved / took
    each = f"{moved / count / 1024:10,.1f} {took / count * 1e6:8.2f}"
    print(f"{count:8} {each} {rate / 1e9:7,.0f} {rate / peak:6.1%}  {name}")


def _compare(decoder: Any, bucket: Any, binding: Any) -> None:
    """Say how far the step's logits are from those of the engine of all other sizes."""
    binding.run()
    ours = bucket.tensors["logits"].to(torch.float32, copy=True)
    decoder.decoder(bucket.size.queries > 1, bucket.size.slots).bind(bucket.tensors).run()
    torch.cuda.synchronize()
    theirs = bucket.tensors["logits"].float()
    difference = float((ours - theirs).abs().max())
    print(f"logits of spread {theirs.std():.3g} are within {difference:.2g} of ONNX Runtime's")


if __name__ == "__main__":
    typer.run(main)
