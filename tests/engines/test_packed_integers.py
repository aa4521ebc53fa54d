"""Packed encoders by 8-bit integers, on the CPU: what they compute, and what a GPU is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from fastgen.bench.shapes import shape_config
from fastgen.blockwise import Format, dequantise, quantise
from fastgen.calibration import Calibration, Range
from fastgen.engines import NotFused
from fastgen.engines.fused.packed_int8 import Int8Product
from fastgen.engines.fused.packed_integers import IntegerProduct, Round
from fastgen.engines.fused.packed_kernels import NormRows, NormStream
from fastgen.engines.fused.packed_ops import Ids, PackedOps, Visible
from fastgen.engines.fused.packed_products import Products
from fastgen.engines.fused.packed_values import Buffer, Rounded
from fastgen.errors import WeightsGoneError
from fastgen.hf.let_go import Gone
from fastgen.quantize import calibrate
from fastgen.target import Target, onnxruntime_cuda
from tests.configs import build_pair
from tests.engines.test_packed_t5 import call, encoder_of
from tests.generation.emulate import gpu_paths
from tests.models import test_bert

FULL = onnxruntime_cuda("float32")
INT8 = replace(FULL, weights="int8", group=128)


@pytest.fixture
def target() -> Target:
    return INT8


@pytest.fixture(autouse=True)
def as_on_a_gpu(target: Target) -> Iterator[None]:
    with mock.patch("fastgen.hf.building.choose_target", lambda *_: target), torch.no_grad():
        yield


calibrated = pytest.mark.parametrize("target", [FULL], ids=["calibrated"])


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """What integers with a step for each row stand for."""
    return dequantise(quantise(x.flatten(0, -2), "int8", 0), x.shape, x.dtype).view_as(x)  # type: ignore[arg-type]


def by(step: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What integers of one step stand for."""
    return lambda x: (x / step).round().clamp(-127, 127) * step


def round_products(stock: Any, inputs: Callable[[str], Any]) -> Any:
    """The same model, whose products read rounded weights, and inputs as by name."""
    model = copy.deepcopy(stock)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (rounds := inputs(name)):
            module.weight.copy_(by_rows(module.weight))
            module.register_forward_pre_hook(lambda _, given, f=rounds: (f(given[0]),))
    return model


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean error beside the spread."""
    return float((found - expected).square().mean().sqrt() / expected.std())


def launched(launches: Any) -> list[Any]:
    """One by one, those too that do not depend on each other."""
    return [e for each in launches for e in getattr(each, "launches", [each])]


def t5_inputs(name: str) -> Any:
    """Activations and gates are split in two, which leaves them nearly as they are."""
    return (lambda x: x) if name.endswith("wo") else by_rows


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("variant", ["t5-1.0", "flan", "umt5", "bart"])
def test_products_of_rounded_rows_by_rounded_weights(variant: str, captured: bool) -> None:
    pair, given = copy.deepcopy(build_pair(variant)), call("holes")
    stock, fast = pair.stock.get_encoder(), pair.fast.get_encoder()
    inputs = (lambda name: by_rows) if variant == "bart" else t5_inputs
    seen = given["attention_mask"].bool()
    with gpu_paths() if captured else nullcontext():
        found = fast(**given)[0][seen]
    whole, expected = (m(**given)[0][seen] for m in (stock, round_products(stock, inputs)))
    assert fast._engine.fused is not None
    assert 3 * off(found, expected) < off(expected, whole) < 0.1


def test_bert_reads_its_norms_both_ways() -> None:
    pair, given = copy.deepcopy(test_bert.build("Model")), test_bert.call("Model", None, types=True)
    stock = copy.deepcopy(pair.stock)
    stock.encoder = round_products(stock.encoder, lambda name: by_rows)
    assert off(pair.fast(**given)[0], stock(**given)[0]) < 5e-3
    launches = pair.fast._engine._counted.launches
    stores = [launch.store for launch in launches if isinstance(launch, NormRows)]
    assert stores == ["BOTH"] * (len(stores) - 1) + ["PLAIN"]


def test_an_edited_weight_is_rounded_anew() -> None:
    pair = copy.deepcopy(build_pair("t5-1.0"))
    pair.fast.engine_options = {"weights": "int8"}
    stock, fast = pair.stock.get_encoder(), pair.fast.get_encoder()
    before = fast(**call(None))[0]
    for model in (stock, fast):
        model.block[0].layer[1].DenseReluDense.wo.weight.mul_(-3)
    found = fast(**call(None))[0]
    assert off(found, round_products(stock, t5_inputs)(**call(None))[0]) < 5e-3
    assert off(found, before) > 0.1


def test_torchs_weights_may_go() -> None:
    fast: Any = copy.deepcopy(build_pair("t5-1.1").fast)
    fast.engine_options = {"weights": "int8", "keep_torch_weights": False}
    fast = fast.get_encoder()
    before = fast(**call(None))[0]
    gone = {name for name, p in fast.named_parameters() if isinstance(p, Gone)}
    linear = [n for n, part in fast.named_modules() if isinstance(part, torch.nn.Linear)]
    assert gone == {f"{name}.weight" for name in linear}
    assert torch.equal(fast(**call(None))[0], before)
    assert fast(**call("right"))[0].shape == before.shape  # recorded and bound anew
    with pytest.raises(WeightsGoneError, match="keep_torch_weights"):
        fast.state_dict()["block.0.layer.0.SelfAttention.q.weight"] + 1


# Calibrated


def bert(**options: Any) -> tuple[Any, Any]:
    """The stock model, and a calibrated one."""
    pair = copy.deepcopy(test_bert.build("Model"))
    calibrate(pair.fast, [test_bert.call("Model", None)], "max", **options)
    return pair.stock, pair.fast


@calibrated
@pytest.mark.parametrize("left_out", [None, "*.intermediate.dense", "*.output.dense", "*.query"])
def test_a_calibrations_steps(left_out: str | None) -> None:
    stock, fast = bert()
    if left_out is not None:
        fast.calibration = fast.calibration.without(left_out)
    steps = {name: known.symmetric() for name, known in fast.calibration.inputs.items()}
    given, whole = test_bert.call("Model", "right"), copy.deepcopy(stock)
    rounded = round_products(stock, lambda name: by(steps[name]) if name in steps else None)
    rounded.pooler = stock.pooler
    seen = given["attention_mask"].bool()
    found, expected, exact = (m(**given)[0][seen] for m in (fast, rounded, whole))
    assert 3 * off(found, expected) < off(expected, exact) < 0.1
    launches = launched(fast._engine._counted.launches)
    assert any(isinstance(launch, IntegerProduct) for launch in launches)  # as it is in float32
    assert any(isinstance(launch, Products) for launch in launches) == (left_out is not None)


@calibrated
def test_what_a_product_activates_it_rounds() -> None:
    fast = bert()[1]
    fast(**test_bert.call("Model", None))
    launches = launched(fast._engine._counted.launches)
    products = [e for e in launches if isinstance(e, IntegerProduct)]
    layers = fast.config.num_hidden_layers
    assert sum(product.leaves is not None for product in products) == layers
    rounds = [e for e in launches if isinstance(e, Round)]
    assert len(rounds) == layers and len(products) == 6 * layers  # of what attention gives


@calibrated
def test_readers_with_ranges_of_their_own() -> None:
    stock, fast = bert()
    inputs = dict(fast.calibration.inputs)
    layer = "encoder.layer.0.attention.self"
    inputs[f"{layer}.key"] = Range(-3.0, 9.0)
    fast.calibration = Calibration(inputs)
    steps = {name: known.symmetric() for name, known in inputs.items()}
    expected = round_products(stock, lambda name: by(steps[name]) if name in steps else None)
    expected.pooler = stock.pooler
    given = test_bert.call("Model", None)
    assert off(fast(**given)[0], expected(**given)[0]) < 5e-3


@calibrated
def test_explain_names_the_calibration_and_what_it_is_not_used_for() -> None:
    fast = bert(attention=True)[1]
    found = fast.explain()
    assert found.calibration == "max" and "linear layers" in found.reasons[0]
    assert str(found).startswith("engine, 8-bit integers by calibration (max)\n  - on a GPU")
    fast.engine_options = {"fused_kernels": False}
    with mock.patch.object(type(fast), "_engine_for"):  # of ONNX Runtime, on a GPU
        found = fast.explain()
    assert found.calibration is None
    assert "not used" in found.reasons[0] and "fused_kernels=False" in found.reasons[0]
    fast.engine_options = None
    fast.calibration = fast.calibration.without("*")
    assert fast.explain().calibration == "max"
    fast.calibration = None
    assert str(fast.explain()) == "engine"


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_rows_and_what_rounding_takes_away(scale: float) -> None:
    x = scale * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    rounded = Rounded(32, split=True)
    for buffer in rounded.buffers:
        buffer.tensor = torch.zeros(4, buffer.width, dtype=buffer.dtype)
    rounded.fill(x)
    assert rounded.rest is not None
    first, rest = (
        part.values.tensor[:3].float() * part.steps.tensor[:3] for part in (rounded, rounded.rest)
    )
    most = x.abs().amax(1, keepdim=True)
    assert torch.equal(first, by_rows(x)) or off(first, by_rows(x)) < 1e-6
    assert ((first + rest - x).abs() <= most / 127 / 254 * 0.51).all()
    assert not first[1].any() and not rest[1].any()


# On a GPU


class Made(dict[str, torch.Tensor]):
    """A model's parameters, and without memory what would be made of them."""

    def __missing__(self, name: str) -> torch.Tensor:
        parameter, _, which = name.split(":")
        shape = Format("int8", 0).shapes(*self[parameter].shape)[which == "scales"]
        dtype = torch.float32 if which == "scales" else torch.int8
        return torch.empty(shape, dtype=dtype, device="meta")


def record(name: str) -> PackedOps:
    config = shape_config(name)
    config.num_layers = 2
    stack = encoder_of(config, "bfloat16")
    root = stack._encoder_root()
    for path, parameter in root.named_parameters():
        parameter.name, parameter._realized = path, True
    own = Made({n: p.detach() for n, p in stack.named_parameters(remove_duplicate=False)})
    ops = PackedOps(replace(INT8, dtype="bfloat16"), own)
    ids = {"input_ids": Ids("input_ids"), "key_positions": Ids(None), "query_positions": None}
    ops.rows(root.encode(ops, **ids, attention_mask=Visible())["last_hidden_state"])
    return ops


@pytest.mark.parametrize("name", ["t5-small", "t5-3b", "flan-t5-xl", "t5-v1_1-xxl-encoder"])
def test_what_is_launched(name: str) -> None:
    """Norms leave integers alone, but for the last."""
    ops = record(name)
    assert ops.embed is not None and ops.embed.store == "ROUNDED"
    launches = launched(ops.launches)
    kinds = [type(launch) for launch in launches]
    gated = "small" not in name and "3b" not in name  # one product of both
    assert kinds.count(Int8Product) == 2 * 7 and kinds.count(Round) == 2 * 2
    assert len(kinds) == 2 * (7 + 2 + 1 + 2)
    assert sum(e.gate is not None for e in launches if isinstance(e, Int8Product)) == 2 * gated
    stores = [launch.store for launch in launches if isinstance(launch, NormStream)]
    assert stores == ["ROUNDED"] * 3 + ["PLAIN"]


def test_rows_that_no_block_holds_are_not_rounded() -> None:
    with pytest.raises(NotFused, match="65536"):
        record("t5-11b")


@pytest.mark.parametrize(("width", "scale"), [(24, 1.0), (32, 0.5)])
def test_what_no_product_serves(width: int, scale: float) -> None:
    weight = mock.Mock()
    weight.name = "w"
    with pytest.raises(NotFused, match="16 must divide"):
        PackedOps(INT8, {"w": torch.ones(width, width)}).linear(Buffer(width), weight, scale=scale)
