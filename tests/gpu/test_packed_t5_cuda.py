"""T5's encoder over packed tokens on a GPU: whole encoders against stock in float64."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

import fastgen
from fastgen.execution.capturing import CAPTURED_TOKENS
from fastgen.execution.encoder import Encoder
from tests.gpu.models import DEVICE, distance, fast_of, ids, masked, medium_stock, ragged

pytestmark = pytest.mark.cuda

NARROW = [torch.bfloat16, torch.float16]
SHAPES: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.1": {"feed_forward_proj": "gated-gelu"},
    "wide heads": {"d_kv": 128, "num_heads": 2, "d_ff": 1000, "num_layers": 2},
    "umt5": {"feed_forward_proj": "gated-gelu"},
}


@functools.cache
def stock(shape: str) -> Any:
    """Random weights in fp32 on the CPU; not to be changed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "d_model": 256, "d_kv": 64, "num_heads": 6, "d_ff": 512}
    fields = sizes | {"num_layers": 4} | SHAPES[shape]
    umt5 = shape == "umt5"
    model = (UMT5EncoderModel if umt5 else T5EncoderModel)(
        (UMT5Config if umt5 else T5Config)(**fields)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(std=2.0)
            elif "layer_norm" in name:
                parameter.normal_(std=0.2).add_(1)
    return model.eval()


def fast_encoder(shape: str, dtype: torch.dtype, **options: Any) -> Any:
    model = getattr(fastgen, f"Fast{type(stock(shape)).__name__}")(
        copy.deepcopy(stock(shape).config)
    )
    model.load_state_dict(stock(shape).state_dict())
    model.engine_options = options
    return model.eval().to(DEVICE, dtype)


def engine_of(model: Any) -> Encoder:
    engine: Encoder = model.encoder._current_engine()
    assert engine.fused is not None, "another engine runs it"
    return engine


def arguments(rows: int, length: int, mask: str | None) -> dict[str, torch.Tensor]:
    """Token ids with a mask by its kind; CAPTURED_TOKENS decides what serves them."""
    given = {"input_ids": ids(rows, length, 512)}
    return given | masked(mask, rows, length)


@pytest.mark.parametrize("mask", [None, "right", "holes"])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_errors_are_no_larger_than_stocks(shape: str, dtype: torch.dtype, mask: str | None) -> None:
    fast, same = fast_encoder(shape, dtype), copy.deepcopy(stock(shape)).to(DEVICE, dtype)
    exact = copy.deepcopy(same).double().cpu()
    for size in ((1, 7), (3, 65), (2, 300), (40, 60)):
        call = arguments(*size, mask)
        assert fast.encoder.refusal(**call) is None
        expected = exact(**{name: value.cpu() for name, value in call.items()})[0]
        own, stocks = (distance(model, call, expected) for model in (fast, same))
        assert own <= 1.1 * stocks + 1e-6, (size, own, stocks)
    engine = engine_of(fast)
    assert [size[:3] for size in engine._replays] == [(32, 1, 32), (288, 3, 96), (640, 2, 320)]
    assert engine._counted is not None


@torch.no_grad()
def test_against_stock_in_float32() -> None:
    exact = copy.deepcopy(stock("1.1")).to(DEVICE)
    for mask in (None, "holes"):
        call = arguments(3, 200, mask)
        seen = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
        found, expected = (
            m(**call)[0].float()[seen] for m in (fast_encoder("1.1", NARROW[0]), exact)
        )
        cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
        assert cosine.min() > 0.999


@torch.no_grad()
def test_float32_is_served_by_the_other_engine() -> None:
    fast, call = fast_encoder("1.0", torch.float32), arguments(3, 40, "holes")
    assert fast.encoder._current_engine().fused is None
    seen = call["attention_mask"].bool()
    expected = copy.deepcopy(stock("1.0")).to(DEVICE)(**call)[0]
    torch.testing.assert_close(fast(**call)[0][seen], expected[seen], rtol=5e-3, atol=5e-3)


@torch.no_grad()
def test_float16_holds_what_exceeds_it() -> None:
    """A residual stream and outputs of products beyond 65,504, which are normed in the end."""
    large = copy.deepcopy(stock("1.1"))
    for block in large.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(30000)
        block.layer[0].SelfAttention.o.weight.mul_(5000)
    fast = fast_encoder("1.1", torch.float16)
    fast.load_state_dict(large.state_dict())
    exact = copy.deepcopy(large).half().double()
    call = arguments(3, 65, "right")
    states = exact(**{n: v.cpu() for n, v in call.items()}, output_hidden_states=True)
    assert max(float(state.abs().max()) for state in states.hidden_states[:-1]) > 65504
    assert distance(fast, call, states[0]) < 5e-3
    engine_of(fast)


@pytest.mark.parametrize("shape", [(3, 65), (40, 100)])
@torch.no_grad()
def test_what_is_hidden_is_zeros_but_where_rows_begin(shape: tuple[int, int]) -> None:
    call = arguments(*shape, "holes")
    hidden = fast_encoder("1.1", torch.bfloat16)(**call).last_hidden_state
    computed = call["attention_mask"].bool()
    computed[:, 0] = True
    assert torch.equal(hidden.any(-1), computed)


@torch.no_grad()
def test_padding_is_computed_on_request() -> None:
    fast = fast_encoder("1.1", torch.bfloat16, skip_padding=False)
    call = arguments(3, 65, "holes")
    exact = copy.deepcopy(stock("1.1")).bfloat16().double()
    expected = exact(**{name: value.cpu() for name, value in call.items()})[0]
    found = fast(**call)[0].double().cpu()
    assert float((found - expected).norm() / expected.norm()) < 2e-2
    engine_of(fast)


@torch.no_grad()
def test_captured_and_launched_give_the_same() -> None:
    fast = fast_encoder("1.1", torch.bfloat16)
    launched = fast_encoder("1.1", torch.bfloat16, cuda_graphs=False)
    sizes = (3, 40), (1, 7), (3, 33), (2, 64), (1, 1), (3, 40), (CAPTURED_TOKENS // 32 + 1, 32)
    for shape in sizes:
        for mask in (None, "right", "holes"):
            call = arguments(*shape, mask)
            found, expected = (model(**call)[0] for model in (fast, launched))
            torch.testing.assert_close(found, expected, rtol=4e-2, atol=4e-2)
    rows = [size[1:3] for size in engine_of(fast)._replays]
    assert rows == [(2, 64), (1, 32), (3, 64)]
    assert not engine_of(launched)._replays


@torch.no_grad()
def test_repeated_calls_give_the_same_bits() -> None:
    """What lies behind the last token is of earlier calls, and nobody reads it."""
    fast, call = fast_encoder("1.1", torch.bfloat16), arguments(3, 40, "holes")
    first = fast(**call)[0].clone()
    for _ in range(200):
        fast(**arguments(3, 40, "right"))
    assert torch.equal(fast(**call)[0], first)


@torch.no_grad()
def test_an_edited_weight_is_seen() -> None:
    fast, same = fast_encoder("umt5", torch.bfloat16), copy.deepcopy(stock("umt5")).to(DEVICE)
    same.bfloat16()
    call = arguments(2, 40, None)
    for _ in range(2):
        found, expected = (model(**call)[0].float() for model in (fast, same))
        assert float((found - expected).norm() / expected.norm()) < 3e-2
        for model in (fast, same):
            layer = model.encoder.block[1].layer
            layer[0].SelfAttention.relative_attention_bias.weight.mul_(-2)
            layer[1].DenseReluDense.wi_1.weight.mul_(2)


@torch.no_grad()
def test_hidden_states_of_all_layers_are_served_by_the_other_engine() -> None:
    fast, call = fast_encoder("1.1", torch.bfloat16), arguments(2, 9, "right")
    states = fast(**call, output_hidden_states=True).hidden_states
    seen = call["attention_mask"].bool()
    assert len(states) == 5
    found = fast(**call)[0][seen]
    torch.testing.assert_close(states[-1][seen], found, rtol=4e-2, atol=4e-2)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_encoder_of_a_model_that_generates(dtype: torch.dtype) -> None:
    reference = medium_stock(feed_forward_proj="gated-gelu")
    fast = fast_of(reference, dtype)
    plain = fast_of(reference, dtype, {"fused_kernels": False})
    call = {"input_ids": ids(3, 40, 512), "attention_mask": ragged(3, 40)}
    call["decoder_input_ids"] = ids(3, 5, 512)
    exact = copy.deepcopy(reference).to(dtype).double()
    with torch.no_grad():
        expected = exact(**{name: value.cpu() for name, value in call.items()}).logits
        errors = [float((m(**call).logits.double().cpu() - expected).norm()) for m in (fast, plain)]
    assert errors[0] <= 1.2 * errors[1]
    engine_of(fast)
    del call["decoder_input_ids"]
    assert fast.generate(**call, max_new_tokens=8).shape == (3, 9)
