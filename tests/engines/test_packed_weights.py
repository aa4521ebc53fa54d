"""Packed encoders by weights of fewer bits, on the CPU: what they compute, what a GPU is given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import T5Config

from fastgen.bench.shapes import shape_config
from fastgen.blockwise import GROUPS, Format, dequantise, quantise
from fastgen.engines import NotFused, nvrtc
from fastgen.engines.fused import encoder, packed_weights
from fastgen.engines.fused.packed_described import Ids, Visible
from fastgen.engines.fused.packed_integers import IntegerProduct
from fastgen.engines.fused.packed_ops import PackedOps
from fastgen.engines.fused.packed_products import Products
from fastgen.engines.fused.packed_weights import Dequantise, Scratch
from fastgen.engines.fused.values import Matrix
from fastgen.hf.let_go import Gone
from fastgen.quantize import calibrate
from fastgen.target import Target, onnxruntime_cuda
from tests.configs import build_pair
from tests.engines.test_packed_integers import by, launched, off, round_products
from tests.engines.test_packed_t5 import call, encoder_of
from tests.generation.emulate import gpu_paths
from tests.models import test_bert
from tests.models.test_bert import CLOSE

FULL = onnxruntime_cuda("float32")
KINDS = [*packed_weights.KINDS]


def target_of(kind: Any, dtype: str = "float32") -> Target:
    return replace(FULL, weights=kind, group=GROUPS[kind], dtype=dtype)


@pytest.fixture(params=KINDS)
def kind(request: Any) -> str:
    found: str = request.param
    return found


@pytest.fixture(autouse=True)
def as_on_a_gpu(kind: str) -> Iterator[None]:
    target = target_of(kind)
    with mock.patch("fastgen.hf.building.choose_target", lambda *_: target), torch.no_grad():
        yield


def rounded(stock: Any, kind: Any) -> Any:
    """The same model of the weights that those of fewer bits stand for."""
    model = copy.deepcopy(stock)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
            weight.copy_(dequantise(quantise(weight, kind), (*weight.shape,), weight.dtype))
    return model


def encoders_of(variant: str, kind: str, **options: Any) -> tuple[Any, Any]:
    pair = copy.deepcopy(build_pair(variant))
    pair.fast.engine_options = {"weights": kind, **options}
    return pair.stock.get_encoder(), pair.fast.get_encoder()


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("variant", ["t5-1.0", "flan", "umt5", "bart"])
def test_products_by_what_the_weights_stand_for(variant: str, captured: bool, kind: str) -> None:
    stock, fast = encoders_of(variant, kind)
    same = rounded(stock, kind)
    for padding in (None, "holes"):
        given = call(padding)
        seen = given.get("attention_mask", torch.ones(3, 9)).bool()
        with gpu_paths() if captured else nullcontext():
            found = fast(**given)[0][seen]
        whole, expected = (model(**given)[0][seen] for model in (stock, same))
        torch.testing.assert_close(found, expected, **CLOSE)
        assert not torch.allclose(whole, expected, rtol=1e-3, atol=1e-3)
    assert fast._engine.fused is not None
    assert str(fast.explain()) == f"engine, {kind} weights"


def test_the_encoder_of_a_bert(kind: str) -> None:
    pair, given = copy.deepcopy(test_bert.build("Model")), test_bert.call("Model", None, types=True)
    stock = copy.deepcopy(pair.stock)
    stock.encoder = rounded(stock.encoder, kind)
    torch.testing.assert_close(pair.fast(**given)[0], stock(**given)[0], **CLOSE)
    assert pair.fast._engine.fused is not None


def test_an_edited_weight_is_rounded_anew(kind: str) -> None:
    stock, fast = encoders_of("t5-1.0", kind)
    before = fast(**call(None))[0]
    for model in (stock, fast):
        model.block[0].layer[1].DenseReluDense.wo.weight.mul_(-3)
    found = fast(**call(None))[0]
    torch.testing.assert_close(found, rounded(stock, kind)(**call(None))[0], **CLOSE)
    assert not torch.allclose(found, before)


def test_torchs_weights_may_go(kind: str) -> None:
    fast = encoders_of("t5-1.1", kind, keep_torch_weights=False)[1]
    before = fast(**call(None))[0]
    gone = {name for name, p in fast.named_parameters() if isinstance(p, Gone)}
    linear = [n for n, part in fast.named_modules() if isinstance(part, torch.nn.Linear)]
    assert gone == {f"{name}.weight" for name in linear}
    assert fast(**call("right"))[0].shape == before.shape  # recorded and bound anew
    assert torch.equal(fast(**call(None))[0], before)


def test_layers_without_a_range_beside_calibrated_ones(kind: str) -> None:
    pair, given = copy.deepcopy(test_bert.build("Model")), test_bert.call("Model", None)
    calibrate(pair.fast, [given], "max")
    pair.fast.calibration = pair.fast.calibration.without("*.query", "*.output.dense")
    steps = {name: known.symmetric() for name, known in pair.fast.calibration.inputs.items()}
    expected = copy.deepcopy(pair.stock)
    integers = {name for name, _ in expected.named_modules() if name in steps}
    expected.encoder = rounded(expected.encoder, kind)
    for name in integers:  # are rounded from the weights themselves
        expected.get_submodule(name).weight.copy_(pair.stock.get_submodule(name).weight)
    expected = round_products(expected, lambda name: by(steps[name]) if name in steps else None)
    expected.pooler = pair.stock.pooler
    found = pair.fast(**given)[0]
    assert off(found, expected(**given)[0]) < 5e-3
    launches = launched(pair.fast._engine._counted.launches)
    assert {Dequantise, IntegerProduct, Products} <= {type(launch) for launch in launches}


@pytest.mark.parametrize(("at_once", "made"), [(1, 14), (1500, 10), (3000, 8)])
def test_matrices_that_products_read_stay(
    at_once: int, made: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, fast = encoders_of("t5-1.1", kind)
    monkeypatch.setattr(packed_weights, "AT_ONCE", at_once)
    expected = rounded(stock, kind)(**call(None))[0]
    for _ in range(2):
        torch.testing.assert_close(fast(**call(None))[0], expected, **CLOSE)
    launches = fast._engine._counted.launches
    assert sum(isinstance(launch, Dequantise) for launch in launches) == made


# On a GPU


class Made(dict[str, torch.Tensor]):
    """A model's parameters, and without memory what would be made of them."""

    def __missing__(self, name: str) -> torch.Tensor:
        parameter, form, which = name.split(":")
        kind, group = form.split("-")
        made, weight = Format(kind, int(group)), self[parameter]  # type: ignore[arg-type]
        part = which == "scales"
        shape, dtype = made.shapes(*weight.shape)[part], made.dtypes(weight.dtype)[part]
        return torch.empty(shape, dtype=dtype, device="meta")


def record(config: Any, target: Target) -> tuple[PackedOps, Scratch]:
    stack = encoder_of(config, "bfloat16")
    root, scratch = stack._encoder_root(), Scratch(torch.bfloat16)
    for path, parameter in root.named_parameters():
        parameter.name, parameter._realized = path, True
    own = Made({n: p.detach() for n, p in stack.named_parameters(remove_duplicate=False)})
    ops = PackedOps(target, own, scratch)
    ids = {"input_ids": Ids("input_ids"), "key_positions": Ids(None), "query_positions": None}
    ops.rows(root.encode(ops, **ids, attention_mask=Visible())["last_hidden_state"])
    return ops, scratch


@pytest.mark.parametrize(
    ("name", "made", "memory"),
    [
        ("t5-small", [6, 6], 3 * 2**20),
        ("t5-large", [5, 5, 2], 2**23),  # wo is beside the next four
        ("t5-v1_1-xxl-encoder", [1] * 14, 4096 * 10240),
    ],
)
def test_what_is_launched(name: str, made: list[int], memory: int, kind: str) -> None:
    """Small matrices are made at once, large ones one by one, in memory of the largest."""
    config = shape_config(name)
    config.num_layers = 2
    ops, scratch = record(config, target_of(kind, "bfloat16"))
    makers = [launch for launch in ops.launches if isinstance(launch, Dequantise)]
    assert [len(launch.made) for launch in makers] == made
    products = [p for each in ops.launches if isinstance(each, Products) for p in each.products]
    assert len(products) == sum(made) and len(scratch.numbers) == memory
    assert "Fp8" in makers[0].body if kind == "fp8" else "Ints<4, 64, bf16>" in makers[0].body


def test_what_is_not_served(kind: str) -> None:
    config = T5Config(num_layers=1)
    with pytest.raises(NotFused, match="516 inputs"):
        record(T5Config(num_layers=1, d_model=516), target_of(kind, "bfloat16"))
    if kind == "int4":
        with pytest.raises(NotFused, match="groups of 32"):
            record(config, replace(target_of(kind, "bfloat16"), group=32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_compiles(dtype: torch.dtype, kind: Any) -> None:
    try:
        nvrtc.version()
    except (ImportError, RuntimeError) as reason:
        pytest.skip(f"no compiler for CUDA: {reason}")
    blocks, launch, compiled = quantise(torch.ones(8, 64, dtype=dtype), kind), Dequantise(), []
    launch.make(Matrix(blocks.values, (64, 8), blocks=blocks), torch.empty(8, 64, dtype=dtype))

    def compile_only(source: str, device: torch.device, engine_cache: object) -> mock.Mock:
        compiled.extend(nvrtc.compiled(source, arch) for arch in ("sm_80", "sm_90a"))
        return mock.Mock()

    with mock.patch.object(nvrtc, "program", compile_only):
        encoder.compile_kernels([launch], dtype, torch.device("cuda"))
    assert all(code.startswith(b"\x7fELF") for code in compiled) and len(compiled) == 2
