"""8-bit products of packed rows against their exact sums, on a GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fastgen.engines import NotFused
from fastgen.engines.fused import packed_int8
from fastgen.engines.fused.encoder import compile_kernels
from fastgen.engines.fused.packed_int8 import TILES, Int8Product, Int8Weight, Tile
from fastgen.engines.fused.packed_values import Buffer, Size
from tests.gpu.models import DEVICE

pytestmark = pytest.mark.cuda

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(128, 256, 128), (300, 520, 272), (257, 264, 1040), (1, 8, 16), (2500, 1024, 10240)]
KINDS = [  # activation, whether gated, and whether added to a residual stream
    *((kind, False, False) for kind in (None, "RELU", "GELU_TANH", "GELU_ERF", "SILU")),
    *(("GELU_TANH", True, False), (None, False, True)),
]


@pytest.fixture(autouse=True, scope="module")
def on_hopper() -> None:
    try:
        packed_int8.check(DEVICE, torch.bfloat16, 16, 8)
    except NotFused as reason:
        pytest.skip(str(reason))


def integers(*axes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, axes, generator=generator, dtype=torch.int8).to(DEVICE)


def normal(*axes: int, seed: int) -> torch.Tensor:
    return torch.randn(axes, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weight_of(outputs: int, inputs: int, dtype: torch.dtype, seed: int) -> Int8Weight:
    scale = normal(outputs, seed=seed).abs() / 64 + 1e-3
    bias = normal(outputs, seed=seed + 1).to(dtype) if seed % 2 else None
    return Int8Weight(integers(outputs, inputs, seed=seed), scale, bias)


def size_of(tokens: int, there: int) -> Size:
    starts = torch.tensor([0, there], dtype=torch.int32, device=DEVICE)
    return Size(tokens, tokens, starts, starts[1:], even=there == tokens)


@pytest.mark.parametrize(("kind", "gated", "onto"), KINDS)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(
    dtype: torch.dtype, tile: Tile, kind: str | None, gated: bool, onto: bool
) -> None:
    products = []
    for rows, outputs, inputs in SHAPES:
        x = Buffer(inputs, integers(rows + 5, inputs, seed=rows))
        scale = normal(rows + 5, 1, seed=3).abs() / inputs**0.5 / 64 + 1e-5
        given = Buffer(1, scale) if rows % 2 == 0 else scale[:1]
        kept = torch.full((rows + 5, outputs), 7.0, device=DEVICE)
        y = Buffer(outputs, kept if onto else kept.to(dtype))
        weight = weight_of(outputs, inputs, dtype, seed=outputs)
        gate = weight_of(outputs, inputs, dtype, seed=outputs + 1) if gated else None
        products.append(Int8Product(x, given, weight, y, kind, gate, onto))
    compile_kernels([product.kernels[tile] for product in products], dtype, DEVICE)
    for product, (rows, _, _) in zip(products, SHAPES, strict=True):
        start = product.y.tensor.clone()
        for there in {rows, -(-rows // 3)}:
            product.y.tensor.copy_(start)
            with mock.patch.object(packed_int8, "best_tile", lambda *_: tile):
                product(size_of(rows, there))
            found = product.y.tensor.clone()
            product.y.tensor.copy_(start)
            product.reference(size_of(there, there))
            eps = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[found.dtype]
            torch.testing.assert_close(found, product.y.tensor, rtol=eps, atol=eps)
