"""8-bit products of packed rows: what they compute, whom they refuse, and that they compile."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fastgen.engines import NotFused, nvrtc
from fastgen.engines.fused import encoder, packed_int8
from fastgen.engines.fused.packed_int8 import Int8Product, Int8Weight, best_tile
from fastgen.engines.fused.packed_values import Buffer, Size

GPU = torch.device("cuda", 0)


def weight_of(outputs: int, inputs: int) -> Int8Weight:
    values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return Int8Weight(values, torch.rand(outputs) / 64, torch.randn(outputs).bfloat16())


def product_of(
    activation: str | None = None, gated: bool = False, onto: bool = False
) -> Int8Product:
    x = Buffer(48, torch.randint(-127, 128, (9, 48), dtype=torch.int8))
    scale = Buffer(1, torch.rand(9, 1) / 64)
    y = Buffer(40, torch.ones(9, 40, dtype=torch.float32 if onto else torch.bfloat16))
    gate = weight_of(40, 48) if gated else None
    return Int8Product(x, scale, weight_of(40, 48), y, activation, gate, onto)


def size_of(tokens: int) -> Size:
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    return Size(tokens, tokens, starts, starts[1:])


def floats(product: Int8Product, weight: Int8Weight) -> torch.Tensor:
    x = product.x.tensor[:7].float() * product.row_scale.tensor[:7]
    y = x @ (weight.values.float() * weight.scale[:, None]).T
    return y + weight.bias.float()


def test_products_on_a_cpu() -> None:
    plain, gated, onto = (
        product_of("GELU_ERF"),
        product_of("RELU", gated=True),
        product_of(onto=True),
    )
    for product in (plain, gated, onto):
        product(size_of(7))
        assert product.y.tensor[7:].eq(1).all()
    expected = torch.nn.functional.gelu(floats(plain, plain.weight))
    torch.testing.assert_close(plain.y.tensor[:7].float(), expected, rtol=1e-2, atol=1e-2)
    expected = floats(gated, gated.weight).relu() * floats(gated, gated.gate)
    torch.testing.assert_close(gated.y.tensor[:7].float(), expected, rtol=1e-2, atol=1e-2)
    expected = 1 + floats(onto, onto.weight)
    torch.testing.assert_close(onto.y.tensor[:7], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0)])
def test_other_gpus_are_refused(capability: tuple[int, int]) -> None:
    with mock.patch("torch.cuda.get_device_capability", lambda _: capability):
        with pytest.raises(NotFused, match=r"compute capability 9\.0"):
            packed_int8.check(GPU, torch.bfloat16, 1024, 1024)
        assert nvrtc.architecture(GPU) == "sm_{}{}".format(*capability)


def test_what_hopper_refuses() -> None:
    with mock.patch("torch.cuda.get_device_capability", lambda _: (9, 0)):
        packed_int8.check(GPU, torch.float16, 1024, 1024)
        with pytest.raises(NotFused, match=r"torch\.float32: float16 or bfloat16"):
            packed_int8.check(GPU, torch.float32, 1024, 1024)
        for sizes in ((1000, 1024), (1024, 1001)):
            with pytest.raises(NotFused, match=f"{sizes[0]} to {sizes[1]} columns: multiples of"):
                packed_int8.check(GPU, torch.float16, *sizes)
        assert nvrtc.architecture(GPU) == "sm_90a"


@pytest.mark.parametrize("kind", [("GELU_TANH", True, False), (None, False, True)])
def test_they_compile(kind: tuple[str | None, bool, bool]) -> None:
    try:
        nvrtc.version()
    except (ImportError, RuntimeError) as reason:
        pytest.skip(f"no compiler for CUDA: {reason}")
    kernels = product_of(*kind).kernels.values()
    compiled = nvrtc.compiled
    codes = []

    def compile_only(source: str, device: torch.device, engine_cache: object) -> mock.Mock:
        codes.append(compiled(source, "sm_90a"))
        return mock.Mock()

    with mock.patch.object(nvrtc, "program", compile_only):
        encoder.compile_kernels([*kernels], torch.bfloat16, GPU)
    assert len(codes) == 1 and codes[0].startswith(b"\x7fELF")
    assert all(kernel.on_gpu for kernel in kernels)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "gated", "expected"),
    [
        (128, 1024, 1024, False, "64"),
        (512, 4096, 4096, False, "128"),
        (512, 10240, 4096, False, "128"),
        (8192, 1024, 1024, False, "128 in turns"),
        (8192, 1024, 4096, False, "128 in turns"),
        (8192, 4096, 1024, False, "256"),
        (8192, 4096, 10240, True, "256"),
    ],
)
def test_tiles(rows: int, inputs: int, outputs: int, gated: bool, expected: str) -> None:
    """Those that an H100 was quickest by: docs/performance.md."""
    assert str(best_tile(rows, inputs, outputs, gated, 132)) == expected
