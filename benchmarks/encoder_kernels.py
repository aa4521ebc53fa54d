"""What the launches of an encoder over packed tokens cost, beside what they must move and compute.

    python -m benchmarks.encoder_kernels bert-large@random --batch 1 --length 128

A line for each kind of launch between the embeddings and the result: how many a call has, the bytes
and operations of one, its time among its like (those of all layers, one after the other, as a
captured graph), and the share of its floor: the time that a copy of its bytes, or a product of all
its operations in the dtype, takes at best (8-bit integers take half of that). Below, their sum
beside the whole graph, in which launches overlap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer

import fastgen
from benchmarks.kernels import seconds
from fastgen.bench.floor import Floor, Machine, measure_machine
from fastgen.bench.shapes import SUFFIX, shape_config, shape_of
from fastgen.engines.fused.packed_attention import Attention, BiasedAttention
from fastgen.engines.fused.packed_int8 import Int8Product
from fastgen.engines.fused.packed_integers import Round
from fastgen.engines.fused.packed_kernels import Activate, NormRows, NormStream
from fastgen.engines.fused.packed_products import Product, Products
from fastgen.engines.fused.packed_values import Size
from fastgen.engines.fused.packed_weights import Dequantise


@dataclass
class Kind:
    """Launches of one instantiation, or of one size of product or attention."""

    floor: Floor
    """Of one of them."""
    runs: list[Callable[[int], None]] = field(default_factory=list)


def kinds(launches: Sequence[Any], size: Size, lengths: Sequence[int]) -> dict[str, Kind]:
    """The kinds of an encoder's launches, in the order of their first; products that run side by
    side are one launch each.

    Args:
        launches: as they were recorded, their buffers in place.
        size: what they are run over.
        lengths: tokens of each row.
    """
    found: dict[str, Kind] = {}

    def note(name: str, floor: Floor, run: Callable[[], None]) -> None:
        found.setdefault(name, Kind(floor)).runs.append(lambda stream: run())

    for launch in (one for each in launches for one in getattr(each, "launches", [each])):
        if isinstance(launch, Products):
            for product, y in zip(launch.products, launch.writes, strict=True):
                note(*_of_product(product, size), _bound(product.into, y, size))
        elif isinstance(launch, Int8Product):
            note(*_of_int8_product(launch, size), _bound(launch, size))
        elif isinstance(launch, Attention | BiasedAttention):
            note(*_of_attention(launch, size, lengths), _bound(launch, size))
        elif isinstance(launch, NormRows | NormStream | Activate | Round):
            rows = [*launch.reads, *launch.writes, *([launch.x] if not launch.writes else [])]
            moved = sum(size.tokens * buffer.width * _bytes(buffer) for buffer in rows)
            note(launch.body, Floor(moved, 0), _bound(launch, size))
        elif isinstance(launch, Dequantise):
            note(*_of_weights(launch), _bound(launch, size))
    return found


def _bound(function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: function(*arguments)


def _bytes(buffer: Any) -> int:
    size: int = buffer.tensor.element_size()
    return size


def _of_product(product: Product, size: Size) -> tuple[str, Floor]:
    inputs, outputs = product.matrix.shape
    numbers = size.tokens * (inputs + outputs) + inputs * outputs
    numbers += 0 if product.bias is None else outputs
    floor = Floor(numbers * product.matrix.element_size(), 2 * size.tokens * inputs * outputs)
    return f"cuBLAS<{inputs}, {outputs}, {product.activation or 'STORE'}>", floor


def _of_int8_product(launch: Int8Product, size: Size) -> tuple[str, Floor]:
    weights = [w for w in (launch.weight, launch.gate) if w is not None]
    outputs, inputs = launch.weight.values.shape
    moved = size.tokens * (inputs + outputs * _bytes(launch.y)) + len(weights) * inputs * outputs
    kind = "ONTO" if launch.onto else launch.activation or "STORED"
    flops = 2 * size.tokens * inputs * outputs * len(weights)
    return f"int8<{inputs}, {outputs}, {kind}>{' * int8' * (len(weights) - 1)}", Floor(moved, flops)


def _of_weights(launch: Dequantise) -> tuple[str, Floor]:
    moved = sum(y.nbytes for _, y in launch.made)
    moved += sum(m.blocks.nbytes for m, _ in launch.made if m.blocks is not None)
    return f"{launch.body} of {launch.numbers / 1e6:.1f} million", Floor(moved, 0)


def _of_attention(
    launch: Attention | BiasedAttention, size: Size, lengths: Sequence[int]
) -> tuple[str, Floor]:
    width = launch.reads[0].width
    moved = 4 * size.tokens * width * _bytes(launch.reads[0])
    flops = sum(4 * length * length * width for length in lengths)
    return f"attention<{launch.heads}, {width // launch.heads}>", Floor(moved, flops)


@torch.no_grad()
def main(
    shape: Annotated[str, typer.Argument(help="NAME@random, of an encoder.")],
    dtype: str = "bfloat16",
    batch: int = 1,
    length: int = 128,
    weights: str = "full",
) -> None:
    """Print the launches of a call of so many full rows."""
    name = shape.removesuffix(SUFFIX)
    torch.manual_seed(0)
    with torch.device("cuda"):
        fast = getattr(fastgen, f"Fast{shape_of(name).stock}")
        model = fast._from_config(shape_config(name), dtype=getattr(torch, dtype)).eval()
        model.engine_options = {"weights": weights}
        model(torch.randint(3, 100, (batch, length)))
    encoder = (model if hasattr(model, "_current_engine") else model.encoder)._current_engine()
    if encoder.fused is None:
        raise SystemExit(f"{shape}: the fused kernels do not serve this encoder")
    machine = measure_machine("cuda", model.dtype)
    with encoder.stream():
        tokens = batch * length
        binding = encoder.fused.bind(tokens, batch)
        starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * length
        size = binding.size(tokens, batch, length)
        size.starts.copy_(starts)
        size.keys.fill_(length)
        layers = binding.layers(size)
        for launch in binding.launches:  # so that what attention makes is there to be read
            launch(size)
        _print(encoder, machine, kinds(binding.launches, size, [length] * batch), layers)


def _print(
    encoder: Any, machine: Machine, found: dict[str, Kind], layers: Callable[[], None]
) -> None:
    print(f"copies at {machine.bytes_per_s / 1e9:,.0f} GB/s, ", end="")
    print(f"products at {machine.flops_per_s / 1e12:,.0f} TFLOP/s")
    head = f"{'launches':>8} {'us each':>8} {'GB/s':>7} {'TFLOP/s':>8} {'share':>6}  kind"
    print(head)
    total, floor = 0.0, 0.0
    for name, kind in found.items():
        took = seconds(encoder, kind.runs)
        total, floor = total + took, floor + len(kind.runs) * kind.floor.seconds(machine)
        _line(len(kind.runs), took, kind.floor, machine, name)
    for took, name in ((total, "their sum"), (seconds(encoder, [_queued(layers)]), "the whole")):
        print(f"{1:8} {took * 1e6:8.1f} {'':7} {'':8} {floor / took:6.1%}  {name}")


def _queued(layers: Callable[[], None]) -> Callable[[int], None]:
    return lambda stream: layers()


def _line(count: int, took: float, floor: Floor, machine: Machine, name: str) -> None:
    each = took / count
    rates = f"{floor.bytes / each / 1e9:7,.0f} {floor.flops / each / 1e12:8.1f}"
    print(f"{count:8} {each * 1e6:8.2f} {rates} {floor.seconds(machine) / each:6.1%}  {name}")


if __name__ == "__main__":
    typer.run(main)
