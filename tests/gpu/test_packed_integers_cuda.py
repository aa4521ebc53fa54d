"""Packed encoders by 8-bit integers on a GPU: kernels against torch, and whole encoders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastgen.blockwise import quantise
from fastgen.engines.fused import packed_kernels as kernels
from fastgen.engines.fused.encoder import compile_kernels
from fastgen.engines.fused.packed_int8 import Int8Product
from fastgen.engines.fused.packed_integers import (
    LEAST_ROWS,
    IntegerProduct,
    Round,
    integer_product,
)
from fastgen.engines.fused.packed_products import Product
from fastgen.engines.fused.packed_values import Buffer, Norm, Rounded
from fastgen.quantize import calibrate
from tests.engines.test_packed_integers import by, off, round_products, t5_inputs
from tests.gpu import test_packed_encoder_cuda as bert
from tests.gpu import test_packed_t5_cuda as t5
from tests.gpu.models import DEVICE, DTYPES
from tests.gpu.test_packed_kernels_cuda import random, size_of

pytestmark = pytest.mark.cuda


def placed(rows: int, rounded: Rounded) -> Rounded:
    for buffer in rounded.buffers:
        count = max(rows, LEAST_ROWS)
        buffer.tensor = torch.zeros(count, buffer.width, dtype=buffer.dtype, device=DEVICE)
    return rounded


def check_left(kernel: kernels.LeavesRows, rows: int, dtype: torch.dtype) -> None:
    """The kernel's integers, and torch's: a number in the middle of two may go either way."""
    size = size_of(1, rows, rows)
    compile_kernels((kernel,), dtype, DEVICE)
    kernel(size)  # type: ignore[operator]
    assert kernel.y.rounded is not None
    buffers = kernel.y.rounded.buffers
    found = [buffer.tensor[:rows].float() for buffer in buffers]
    assert found[0].any(1).sum() >= rows - 1
    reference: Any = getattr(kernel, "reference", None)
    if reference is None:
        assert isinstance(kernel, Round)
        kernel.y.rounded.fill(kernel.x.tensor[:rows].float())
    else:
        reference(size)
    finer = False
    for buffer, left in zip(buffers, found, strict=True):
        expected = buffer.tensor[:rows].float()
        if buffer.dtype != torch.int8:
            torch.testing.assert_close(left, expected, rtol=1e-5, atol=1e-12)
            finer = True  # behind the first steps come the parts that rounding takes away
            continue
        apart = (left - expected).abs()
        if not finer or kernel.y.rounded.rest is None:
            assert apart.max() <= 1
        assert float((apart > 0).float().mean()) < 2e-2


@pytest.mark.parametrize("step", [None, 0.02])
@pytest.mark.parametrize("width", [8, 1024, 10240, 32768])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded(dtype: torch.dtype, width: int, step: float | None) -> None:
    x = Buffer(width, random(9, width, dtype=dtype))
    x.tensor[4] = 0
    check_left(Round(x, placed(9, Rounded.on(DEVICE, width, step))), 9, dtype)
    if step is None:
        check_left(Round(x, placed(9, Rounded.on(DEVICE, width, split=True))), 9, dtype)


@pytest.mark.parametrize("step", [None, 0.02])
@pytest.mark.parametrize("width", [8, 1024, 4096, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_leave_integers(dtype: torch.dtype, width: int, step: float | None) -> None:
    weight, bias = (random(width, dtype=dtype, seed=seed) for seed in (7, 8))
    x, residual = (Buffer(width, random(9, width, dtype=dtype, seed=n)) for n in range(2))
    for plain in (True, False):
        y = Buffer(width, torch.zeros(9, width, dtype=dtype, device=DEVICE), plain=plain)
        y.rounded = placed(9, Rounded.on(DEVICE, width, step))
        check_left(kernels.NormRows(x, residual, Norm(weight, bias, 1e-5), y), 9, dtype)
        stream = Buffer(width, random(9, width, seed=3), dtype=torch.float32)
        check_left(kernels.NormStream(stream, Norm(weight, None, 1e-6), y), 9, dtype)


def product_of(
    x: Rounded, outputs: int, dtype: torch.dtype, seed: int, biased: bool, **more: Any
) -> Product:
    blocks = quantise(random(outputs, x.width, dtype=dtype, seed=seed) / x.width**0.5, "int8", 0)
    bias = random(outputs, dtype=dtype, seed=seed + 1) if biased else None
    return Product(x, blocks.values.T, bias, steps=blocks.scales, **more)


@pytest.mark.parametrize("step", [None, 0.02])
@pytest.mark.parametrize("rows", [1, 17, 32, 77, 513])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_integers(dtype: torch.dtype, rows: int, step: float | None) -> None:
    x = placed(rows, Rounded.on(DEVICE, 256, step))
    x.fill(random(rows, 256))
    size = size_of(1, rows, rows)

    def check(kernel: IntegerProduct, before: torch.Tensor) -> None:
        for buffer in kernel.writes[1:]:
            count = max(rows, LEAST_ROWS)
            buffer.tensor = torch.zeros(count, 96, dtype=torch.int32, device=DEVICE)
        compile_kernels((kernel,), dtype, DEVICE)
        results = []
        for run in (kernel, kernel.reference):
            kernel.y.tensor = before.clone()
            run(size)
            results.append(kernel.y.tensor.float())
        if before.dtype == torch.int8:
            apart = (results[0] - results[1]).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() < 2e-2
            return
        rough = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(*results, rtol=rough, atol=rough)

    empty = torch.zeros(rows, 96, dtype=dtype, device=DEVICE)
    for biased in (False, True):
        check(IntegerProduct(product_of(x, 96, dtype, 5, biased)), empty)
        gate = product_of(x, 96, dtype, 7, biased)
        for kind in ("RELU", "GELU_TANH", "GELU_ERF", "SILU"):
            product = product_of(x, 96, dtype, 5, biased, activation=kind)
            check(IntegerProduct(product), empty)
            check(IntegerProduct(product, gate), empty)
        leaves = placed(rows, Rounded.on(DEVICE, 96, 0.03))
        check(IntegerProduct(product, leaves=leaves), torch.zeros_like(leaves.values.tensor))
    stream = Buffer(96, dtype=torch.float32)
    check(
        IntegerProduct(product_of(x, 96, dtype, 5, False, onto=stream)),
        1e5 * random(rows, 96, seed=2),
    )


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="of the tensor cores of compute capability 9.0",
)
@pytest.mark.parametrize("outputs", [16, 272, 4096])
@pytest.mark.parametrize("rows", [1, 77, 300])
def test_products_that_leave_integers(rows: int, outputs: int) -> None:
    x, leaves = placed(rows, Rounded(272)), placed(rows, Rounded.on(DEVICE, outputs, 0.03))
    x.fill(random(rows, 272))
    size = size_of(1, rows, rows)
    size.starts[-1] = rows
    for activation in (None, "GELU_TANH"):
        product = product_of(x, outputs, torch.bfloat16, 5, True, activation=activation)
        kernel = integer_product(product, torch.bfloat16, leaves=leaves)
        assert isinstance(kernel, Int8Product)
        compile_kernels([*kernel.kernels.values()], torch.bfloat16, DEVICE)
        results = []
        for run in (kernel, kernel.reference):
            leaves.values.tensor.fill_(77)
            run(size)
            results.append(leaves.values.tensor.int())
        assert (results[0][rows:] == 77).all()
        apart = (results[0] - results[1]).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 2e-2


@pytest.mark.parametrize("mask", [None, "holes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["1.0", "1.1", "umt5"])
@torch.no_grad()
def test_t5_by_8_bit_weights(shape: str, dtype: torch.dtype, mask: str | None) -> None:
    """As far from float32 as rounding makes it, and no farther."""
    fast = t5.fast_encoder(shape, dtype, weights="int8")
    exact = copy.deepcopy(t5.stock(shape)).to(DEVICE)
    rounded = round_products(exact, t5_inputs)
    for size in ((1, 7), (3, 65), (40, 100)):
        call = t5.arguments(*size, mask)
        seen = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
        found, expected, whole = (m(**call)[0].float()[seen] for m in (fast, rounded, exact))
        assert off(found, whole) < 1.1 * off(expected, whole) + 2e-2 * (dtype == torch.bfloat16)
        cosine = torch.nn.functional.cosine_similarity(found, whole, dim=-1)
        assert cosine.min() > 0.998
    assert t5.engine_of(fast).fused is not None


@torch.no_grad()
def test_torchs_weights_may_go() -> None:
    options = {"weights": "int8", "keep_torch_weights": False}
    fast, kept = (
        t5.fast_encoder("1.1", torch.bfloat16, **some) for some in (options, {"weights": "int8"})
    )
    for size in ((1, 7), (40, 100)):
        call = t5.arguments(*size, "holes")
        assert torch.equal(fast(**call)[0], kept(**call)[0])


@pytest.mark.parametrize("mask", [None, "holes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_calibrated_bert(dtype: torch.dtype, mask: str | None) -> None:
    fast, exact = bert.fast_of(dtype), copy.deepcopy(bert.stock()).to(DEVICE)
    calibrate(fast, [bert.arguments(4, 60, None)], "max")
    steps = {name: known.symmetric() for name, known in fast.calibration.inputs.items()}
    rounded = round_products(exact, lambda name: by(steps[name]) if name in steps else None)
    for shape in ((1, 7), (3, 65), (40, 100)):
        call = bert.arguments(*shape, mask)
        seen = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
        found, expected, whole = (m(**call)[0].float()[seen] for m in (fast, rounded, exact))
        assert off(found, whole) < 1.1 * off(expected, whole) + 2e-2
        assert off(expected, whole) < 0.1
    assert bert.engine_of(fast).fused is not None
