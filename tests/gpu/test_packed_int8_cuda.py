"""8-bit products of packed rows against their exact sums, on a GPU."""

from __future__ import annotations

from typing import Any
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

SHAPES = [(128, 256, 128), (300, 520, 272), (257, 264, 1040), (1, 8, 16), (2500, 1024, 2064)]
STEP = 0.03
KINDS: dict[str, dict[str, Any]] = {
    "stored": {},
    "relu": {"activation": "RELU"},
    "tanh": {"activation": "GELU_TANH"},
    "erf": {"activation": "GELU_ERF"},
    "silu": {"activation": "SILU"},
    "gated": {"activation": "GELU_TANH", "gate": True},
    "stream": {"onto": True},
    "integers": {"activation": "GELU_TANH", "step": STEP},
}
CASES = [
    *((torch.bfloat16, kind) for kind in KINDS),
    *((torch.float16, kind) for kind in ("stored", "gated")),
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


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("dtype", "kind"), CASES)
def test_products(dtype: torch.dtype, kind: str, tile: Tile) -> None:
    options, products = KINDS[kind], []
    left = {"stream": torch.float32, "integers": torch.int8}.get(kind, dtype)
    for rows, outputs, inputs in SHAPES:
        x = Buffer(inputs, integers(rows + 5, inputs, seed=rows))
        scale = normal(rows + 5, 1, seed=3).abs() / inputs**0.5 / 64 + 1e-5
        given = Buffer(1, scale) if rows % 2 == 0 else scale[:1]
        y = Buffer(outputs, torch.full((rows + 5, outputs), 7, dtype=left, device=DEVICE))
        weight, gate = (weight_of(outputs, inputs, dtype, seed=outputs + i) for i in range(2))
        gates = {"gate": gate} if "gate" in options else {}
        products.append(Int8Product(x, given, weight, y, **(options | gates)))
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
            assert torch.equal(found[there:], start[there:])
            close(found, product.y.tensor)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to one rounding."""
    if found.dtype == torch.int8:
        apart = (found.int() - expected.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-2
        return
    eps = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps)
