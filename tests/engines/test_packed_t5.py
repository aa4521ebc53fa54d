"""T5's encoder over packed tokens, on the CPU; and what a GPU would be given, recorded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers import T5Config

import fastgen
from fastgen.bench.shapes import SHAPES, shape_config
from fastgen.engines import NotFused
from fastgen.engines.fused.packed_attention import BiasedAttention
from fastgen.engines.fused.packed_described import Ids, Visible
from fastgen.engines.fused.packed_kernels import Activate, NormStream
from fastgen.engines.fused.packed_ops import PackedOps
from fastgen.engines.fused.packed_plan import MOST_FETCHED, fetch_ahead
from fastgen.engines.fused.packed_products import Products
from fastgen.execution.encoder import Encoder
from fastgen.target import onnxruntime_cuda
from tests.configs import VARIANTS, Pair, build_pair
from tests.generation.emulate import gpu_paths
from tests.models.test_bert import CLOSE, kept

TARGET = onnxruntime_cuda("float32")
META = torch.device("meta")
T5S = [name for name, variant in VARIANTS.items() if "Bart" not in variant.stock]
PUBLISHED = [
    name for name, shape in SHAPES.items() if shape.stock.startswith("T5") and "tiny" not in name
]


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with mock.patch("fastgen.hf.building.choose_target", lambda *_: TARGET), torch.no_grad():
        yield


def encoders_of(variant: str, **options: Any) -> Pair:
    pair = copy.deepcopy(build_pair(variant))
    pair.fast.engine_options = options
    return Pair(pair.stock.get_encoder(), pair.fast.get_encoder())


def call(padding: str | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {"input_ids": torch.randint(3, 96, (3, 9), generator=generator)}
    return given if padding is None else given | {"attention_mask": kept(padding).long()}


def both(pair: Pair, padding: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What stock gives and what Fast gives, of visible tokens."""
    given = call(padding)
    seen = given.get("attention_mask", torch.ones(3, 9)).bool()
    found: Any = [model(**given)[0][seen] for model in (pair.stock, pair.fast)]
    return found[0], found[1]


def engine_of(stack: Any) -> Encoder:
    engine: Encoder = stack._engine
    assert engine.fused is not None
    return engine


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("variant", T5S)
def test_same_outputs(variant: str, captured: bool) -> None:
    pair = encoders_of(variant)
    with gpu_paths() if captured else nullcontext():
        for padding in (None, "full", "right", "left", "holes"):
            expected, found = both(pair, padding)
            torch.testing.assert_close(found, expected, **CLOSE)
    sizes = [size[:3] for size in engine_of(pair.fast)._replays]
    assert sizes == ([(96, 3, 32)] if captured else [])


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_padding_is_zeros_or_what_stock_computes(padding: str) -> None:
    mask = kept(padding)
    for skip in (True, False):
        pair = encoders_of("umt5", skip_padding=skip)
        expected, found = (m(**call(padding))[0] for m in (pair.stock, pair.fast))
        if skip:
            computed = mask.clone()
            computed[:, 0] = True
            assert torch.equal(found.any(-1), computed)
            torch.testing.assert_close(found[computed], expected[computed], **CLOSE)
        else:
            torch.testing.assert_close(found, expected, **CLOSE)
        engine_of(pair.fast)


def test_an_edited_weight_is_seen() -> None:
    """A table of positions, too."""
    pair = encoders_of("t5-1.1", prepack=0.0)
    before = both(pair, None)[1]
    engine = engine_of(pair.fast)
    for model in (pair.stock, pair.fast):
        model.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.mul_(-3)
        model.block[1].layer[1].layer_norm.weight.mul_(2)
    expected, found = both(pair, "right")
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(both(pair, None)[1], before)
    assert engine_of(pair.fast) is engine


def test_the_stack_of_a_whole_model_and_of_an_encoder_model() -> None:
    given = call("right")
    for head in ("EncoderModel", "ForTokenClassification"):
        config = T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=2)
        stock = getattr(transformers, f"T5{head}")(config).eval()
        fast = getattr(fastgen, f"FastT5{head}")(config).eval()
        fast.load_state_dict(stock.state_dict())
        seen = given["attention_mask"].bool()
        expected, found = (model(**given)[0][seen] for model in (stock, fast))
        torch.testing.assert_close(found, expected, **CLOSE)
        stack = fast.encoder if head == "EncoderModel" else fast.transformer.encoder
        engine_of(stack)


# On a GPU


def record(stack: Any, dtype: str) -> PackedOps:
    """What an encoder launches there."""
    root, own = stack._encoder_root(), dict(stack.named_parameters(remove_duplicate=False))
    for name, parameter in root.named_parameters():
        parameter.name, parameter._realized = name, True
    ops = PackedOps(onnxruntime_cuda(dtype), {n: p.detach() for n, p in own.items()})
    ids = {"input_ids": Ids("input_ids"), "key_positions": Ids(None), "query_positions": None}
    ops.rows(root.encode(ops, **ids, attention_mask=Visible())["last_hidden_state"])
    return ops


def encoder_of(config: T5Config, dtype: str, family: str = "T5") -> Any:
    """An encoder without memory."""
    with META:
        model = getattr(fastgen, f"Fast{family}EncoderModel")(config)
    return model.eval().to(getattr(torch, dtype)).encoder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shape_of_the_benchmark_runs_packed(name: str, dtype: str) -> None:
    """Recorded without a refusal, with as many launches for each layer."""
    config = shape_config(name)
    config.num_layers = 2
    ops = record(encoder_of(config, dtype), dtype)
    own = not config.is_gated_act and dtype == "float16"  # else the product activates
    each = 7 + (config.is_gated_act or own)
    assert len(ops.launches) == 2 * each and ops.embed is not None and ops.reads_columns
    kinds = [type(launch) for launch in ops.launches]
    assert kinds.count(BiasedAttention) == 2 and kinds.count(NormStream) == 4
    assert kinds.count(Activate) == 2 * (each - 7)
    assert sum(b.dtype == torch.float32 for each in ops.launches for b in each.writes) == 4


def test_every_layer_of_umt5_has_a_table_of_its_own() -> None:
    config = transformers.UMT5Config(num_layers=3)
    ops = record(encoder_of(config, "bfloat16", "UMT5"), "bfloat16")
    tables = [each.table for each in ops.launches if isinstance(each, BiasedAttention)]
    assert len({id(table.weight) for table in tables}) == 3
    assert [table.reach for table in tables] == [128] * 3


@pytest.mark.parametrize(
    ("fields", "dtype", "reason"),
    [
        ({}, "float32", "float32"),
        ({"d_kv": 24}, "bfloat16", "head size 24"),
        ({"d_kv": 160}, "bfloat16", "head size 160"),
        ({"relative_attention_max_distance": 600}, "bfloat16", "1201 distances"),
        ({"d_model": 8704}, "bfloat16", "8192 at most"),
    ],
)
def test_what_no_kernel_serves(fields: dict[str, Any], dtype: str, reason: str) -> None:
    with pytest.raises(NotFused, match=reason):
        record(encoder_of(T5Config(num_layers=1, **fields), dtype), dtype)


def test_only_weights_that_the_cache_holds_are_fetched_ahead() -> None:
    def fetched(name: str) -> list[list[tuple[int, ...]]]:
        config = shape_config(name)
        config.num_layers = 2
        ops = record(encoder_of(config, "bfloat16"), "bfloat16")
        ahead = fetch_ahead(ops.launches)
        groups = [each for each in ops.launches if isinstance(each, Products)]
        assert sum(group.ahead is not None for group in groups) == len(ahead)
        weights = [each._weights for each in ahead]
        assert all(sum(w.nbytes for w in some) <= MOST_FETCHED for some in weights)
        return [[tuple(weight.shape) for weight in some] for some in weights]

    square = (1024, 1024)
    assert fetched("t5-large")[0] == [square, (1024, 4096), (4096, 1024), square, square, square]
    assert fetched("t5-v1_1-xxl-encoder") == []
