"""Packed encoders by 8-bit floats, on the CPU: what they compute, and what a GPU would be given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from fastgen.bench.shapes import shape_config
from fastgen.blockwise import Format, dequantise, quantise
from fastgen.engines import NotFused
from fastgen.engines.fused import encoder as packed
from fastgen.engines.fused.packed_kernels import NormRows, NormStream, Round
from fastgen.engines.fused.packed_ops import Ids, PackedOps, Visible
from fastgen.engines.fused.packed_values import Buffer, Rounded
from fastgen.target import onnxruntime_cuda
from tests.configs import build_pair
from tests.engines.test_packed_t5 import call, encoder_of
from tests.models import test_bert

FP8 = replace(onnxruntime_cuda("float32"), weights="fp8", group=0)


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with mock.patch("fastgen.hf.building.choose_target", lambda *_: FP8), torch.no_grad():
        yield


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What rows of 8-bit floats with a scale each stand for."""
    return dequantise(quantise(x.flatten(0, -2), "fp8"), x.shape, x.dtype).view_as(x)


def round_products(stock: Any) -> Any:
    """The same model, whose products read rounded inputs and weights."""
    model = copy.deepcopy(stock)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(rounded(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    return model


def least_cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(found, expected, dim=-1).min())


@pytest.mark.parametrize("padding", [None, "holes"])
@pytest.mark.parametrize("variant", ["t5-1.0", "flan", "umt5", "t5-epsilon", "bart"])
def test_products_of_rounded_rows_by_rounded_weights(variant: str, padding: str | None) -> None:
    pair, given = copy.deepcopy(build_pair(variant)), call(padding)
    stock, fast = pair.stock.get_encoder(), pair.fast.get_encoder()
    seen = given.get("attention_mask", torch.ones(3, 9)).bool()
    whole, expected, found = (m(**given)[0][seen] for m in (stock, round_products(stock), fast))
    assert fast._engine.fused is not None
    assert least_cosine(found, expected) > 0.999 > least_cosine(expected, whole)


def test_bert_reads_its_norms_both_ways() -> None:
    pair = copy.deepcopy(test_bert.build("Model"))
    given = test_bert.call("Model", None, types=True)
    stock = copy.deepcopy(pair.stock)
    stock.encoder = round_products(stock.encoder)
    assert least_cosine(pair.fast(**given)[0], stock(**given)[0]) > 0.999
    launches = pair.fast._engine._counted.launches
    stores = [launch.store for launch in launches if isinstance(launch, NormRows)]
    assert stores == ["BOTH"] * (len(stores) - 1) + ["PLAIN"]


def test_an_edited_weight_is_rounded_anew() -> None:
    pair = copy.deepcopy(build_pair("t5-1.0"))
    stock, fast = pair.stock.get_encoder(), pair.fast.get_encoder()
    before = fast(**call(None))[0]
    for model in (stock, fast):
        model.block[0].layer[1].DenseReluDense.wo.weight.mul_(-3)
    found = fast(**call(None))[0]
    assert least_cosine(found, round_products(stock)(**call(None))[0]) > 0.999
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_rows_are_rounded_as_weights_are(scale: float) -> None:
    x = Buffer(32, scale * torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    x.tensor[1] = 0
    kernel = Round(x)
    assert kernel.y.rounded is not None
    values, scales = kernel.y.rounded.buffers
    values.tensor = torch.zeros(3, 32, dtype=torch.float8_e4m3fn)
    scales.tensor = torch.ones(3, 1)
    kernel(SimpleNamespace(tokens=3))  # type: ignore[arg-type]
    expected = rounded(x.tensor)
    found = values.tensor.float() * scales.tensor
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) / 28)
    assert not found[1].any() and scales.tensor[1] == 0


# On a GPU


class Made(dict[str, torch.Tensor]):
    """A model's parameters, and without memory what would be made of them."""

    def __missing__(self, name: str) -> torch.Tensor:
        parameter, _, which = name.split(":")
        outputs, inputs = self[parameter].shape
        shape = Format("fp8", 0).shapes(outputs, inputs)[which == "scales"]
        dtype = torch.float32 if which == "scales" else torch.float8_e4m3fn
        return torch.empty(shape, dtype=dtype, device="meta")


def record(name: str) -> PackedOps:
    config = shape_config(name)
    config.num_layers = 2
    stack = encoder_of(config, "bfloat16")
    root = stack._encoder_root()
    for path, parameter in root.named_parameters():
        parameter.name, parameter._realized = path, True
    own = Made({n: p.detach() for n, p in stack.named_parameters(remove_duplicate=False)})
    ops = PackedOps(replace(FP8, dtype="bfloat16"), own)
    ids = {"input_ids": Ids("input_ids"), "key_positions": Ids(None), "query_positions": None}
    ops.rows(root.encode(ops, **ids, attention_mask=Visible())["last_hidden_state"])
    return ops


@pytest.mark.parametrize("name", ["t5-small", "t5-3b", "flan-t5-xl", "t5-v1_1-xxl-encoder"])
def test_what_is_launched(name: str) -> None:
    """Norms leave 8-bit floats alone, but for the last; the others are rounded by one launch."""
    ops = record(name)
    assert ops.embed is not None and ops.embed.store == "ROUNDED"
    assert len(ops.launches) == 2 * 9 - 1 + 1
    stores = [launch.store for launch in ops.launches if isinstance(launch, NormStream)]
    assert stores == ["ROUNDED"] * 3 + ["PLAIN"]
    assert sum(isinstance(launch, Round) for launch in ops.launches) == 4


def test_rows_that_no_block_holds_are_not_rounded() -> None:
    with pytest.raises(NotFused, match="65536"):
        record("t5-11b")


def ops_of(width: int = 32) -> PackedOps:
    return PackedOps(FP8, {"w": torch.ones(width, width)})


@pytest.mark.parametrize(
    ("width", "scale", "reason"), [(24, 1.0, "16 must divide"), (32, 0.5, "scaled products")]
)
def test_what_no_product_serves(width: int, scale: float, reason: str) -> None:
    with pytest.raises(NotFused, match=reason):
        ops_of(width).linear(Buffer(width), SimpleNamespace(name="w"), scale=scale)


@pytest.mark.parametrize(
    ("weights", "dtype", "capability", "reason"),
    [
        ("int8", "bfloat16", (9, 0), "int8"),
        ("int4", "bfloat16", (9, 0), "int4"),
        ("fp8", "float16", (9, 0), "in bfloat16"),
        ("fp8", "float32", (9, 0), "in bfloat16"),
        ("fp8", "bfloat16", (8, 6), "8.9"),
        ("fp8", "bfloat16", (8, 9), None),
        ("full", "float16", (8, 0), None),
    ],
)
def test_who_is_served(
    weights: Any, dtype: str, capability: tuple[int, int], reason: str | None
) -> None:
    target = replace(onnxruntime_cuda(dtype), weights=weights)
    with mock.patch.object(torch.cuda, "get_device_capability", lambda *_: capability):
        found = packed._weights_refusal(target, torch.device("cuda"))
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_two_readers_share_what_was_rounded() -> None:
    ops, x = ops_of(), Buffer(32)
    products = [ops.linear(x, SimpleNamespace(name="w")) for _ in range(2)] if made(ops) else []
    assert isinstance(products[0].x, Rounded) and products[0].x is products[1].x
    assert [type(launch) for launch in ops.launches] == [Round]


def made(ops: PackedOps) -> bool:
    """Give it what is made of its weight."""
    blocks = quantise(torch.ones(32, 32), "fp8")
    values, scales = Format("fp8", 0).names("w")
    ops._parameters = {**ops._parameters, values: blocks.values, scales: blocks.scales}
    return True
