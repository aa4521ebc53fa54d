"""Packed encoders by weights of fewer bits on a GPU: the kernel against torch, whole encoders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastgen.blockwise import GROUPS, Blocks, dequantise, quantise
from fastgen.engines.fused import packed_weights
from fastgen.engines.fused.encoder import compile_kernels
from fastgen.engines.fused.packed_weights import KINDS, Dequantise
from fastgen.engines.fused.values import Matrix
from tests.engines.test_packed_weights import rounded
from tests.gpu import test_packed_encoder_cuda as bert
from tests.gpu import test_packed_t5_cuda as t5
from tests.gpu.models import DEVICE, DTYPES, distance
from tests.gpu.test_packed_kernels_cuda import random, size_of

pytestmark = pytest.mark.cuda

NARROW = [torch.bfloat16, torch.float16]
SIZES = [(64, 1), (384, 1536), (8, 3), (1000, 77), (4096, 1024), (72, 4099)]


def matrix_of(kind: Any, inputs: int, outputs: int, dtype: torch.dtype, group: int) -> Matrix:
    weight = random(outputs, inputs, dtype=dtype, seed=inputs)
    weight[0] = 0
    blocks: Blocks = quantise(weight, kind, group)
    return Matrix(blocks.values, (inputs, outputs), blocks=blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True], ids=["own scales", "float scales"])
@pytest.mark.parametrize(
    ("kind", "group"), [("int4", 64), ("int4", 128), ("int8", 128), ("fp8", 0)]
)
def test_matrices_are_what_the_weights_stand_for(
    kind: str, group: int, wide: bool, dtype: torch.dtype
) -> None:
    launch = Dequantise()
    place = torch.full((sum(k * n for k, n in SIZES) + 8,), 77.0, device=DEVICE).to(dtype)
    matrices, parts = [], []
    for inputs, outputs in SIZES:
        matrix = matrix_of(kind, inputs, outputs, torch.float32 if wide else dtype, group)
        start, stop = launch.numbers, launch.numbers + inputs * outputs
        parts.append(place[start:stop].view(outputs, inputs))
        matrices.append(matrix)
        launch.make(matrix, parts[-1])
    compile_kernels((launch,), dtype, DEVICE)
    launch(size_of(1, 1))
    for matrix, found in zip(matrices, parts, strict=True):
        assert matrix.blocks is not None
        assert torch.equal(found, dequantise(matrix.blocks, (*found.shape,), dtype))
    assert (place[-8:] == 77).all()


def errors(fast: Any, same: Any, exact: Any, call: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Of Fast and of stock in the same dtype, by the same rounded weights."""
    expected = exact(**{name: value.cpu() for name, value in call.items()})[0]
    return distance(fast, call, expected), distance(same, call, expected)


@pytest.mark.parametrize("at_once", [100_000, 300_000])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["1.0", "1.1"])
@torch.no_grad()
def test_t5(
    shape: str, kind: str, dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No farther from float64 by the rounded weights than stock is in the same dtype: captured with
    streams beside the engine's, captured without, and launched."""
    monkeypatch.setattr(packed_weights, "AT_ONCE", at_once)  # less than some matrix, or than all
    fast = t5.fast_encoder(shape, dtype, weights=kind)
    same = rounded(copy.deepcopy(t5.stock(shape)).to(DEVICE, dtype), kind)
    exact = copy.deepcopy(same).double().cpu()
    for size in ((1, 7), (3, 65), (4, 200), (40, 60)):
        own, stocks = errors(fast, same, exact, t5.arguments(*size, "holes"))
        assert own <= 1.1 * stocks + 1e-6, (size, own, stocks)
    launches = t5.engine_of(fast).fused._record()[0].launches  # type: ignore[union-attr]
    assert sum(isinstance(launch, Dequantise) for launch in launches) > 4  # of as many layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bert(kind: str, dtype: torch.dtype) -> None:
    fast = bert.fast_of(dtype, weights=kind)
    same = copy.deepcopy(bert.stock()).to(DEVICE, dtype)
    same.encoder = rounded(same.encoder, kind)
    exact = copy.deepcopy(same).double().cpu()
    for size in ((1, 7), (3, 65), (40, 60)):
        own, stocks = errors(fast, same, exact, bert.arguments(*size, "holes"))
        assert own <= 1.1 * stocks + 1e-6, (size, own, stocks)
    assert bert.engine_of(fast).target.weights == kind


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_torchs_weights_may_go(kind: str) -> None:
    options = {"weights": kind, "keep_torch_weights": False}
    fast, kept = (
        t5.fast_encoder("1.1", torch.bfloat16, **some) for some in (options, {"weights": kind})
    )
    for size in ((1, 7), (40, 100)):
        call = t5.arguments(*size, "holes")
        assert torch.equal(fast(**call)[0], kept(**call)[0])


@torch.no_grad()
def test_float16_with_the_matrices_that_stock_keeps_in_float32() -> None:
    """T5's ``wo``, as it is loaded: its blocks have scales in float32."""
    fast, same = (t5.fast_encoder("1.1", torch.float16, weights="int4") for _ in range(2))
    for module in fast.encoder.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    call = t5.arguments(3, 65, None)
    assert t5.engine_of(fast).target.weights == "int4" and GROUPS["int4"] == 64
    torch.testing.assert_close(fast(**call)[0], same(**call)[0], rtol=1e-2, atol=1e-2)
