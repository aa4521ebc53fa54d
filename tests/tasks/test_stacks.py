"""A program that calls the stacks itself: hidden states, loops over the decoder, KV caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.t5.modeling_t5 import T5Stack

from fastgen.hf.cache import StaticKVCache
from fastgen.hf.contract import CACHE
from fastgen.hf.module import EngineModule
from fastgen.tasks.outputs import as_stock
from tests.configs import Pair, build_pair
from tests.helpers import CAUSAL, CLOSE, copies, logits, refusal, sources, targets

MASK = (torch.arange(9) < torch.tensor([[9], [5], [1]])).long()


@torch.no_grad()
def loop(model: Any, steps: int, hand_on: bool = True, **arguments: Any) -> torch.Tensor:
    """Greedy tokens [3, steps] of a program's own loop over the decoder stack and the head."""
    encoded = model.encoder(sources(), attention_mask=MASK).last_hidden_state
    scaled = model.lm_head.weight is model.shared.weight and model.config.tie_word_embeddings
    scale = getattr(model.config, "scale_decoder_outputs", scaled)
    ids, past = torch.full((3, 1), model.config.decoder_start_token_id), None
    for _ in range(steps):
        output = model.decoder(
            input_ids=ids if past is None else ids[:, -1:],
            encoder_hidden_states=encoded,
            encoder_attention_mask=MASK,
            **({CACHE: past} if hand_on else {}),
            **arguments,
        )
        past = output[CACHE] if hand_on else None
        hidden = output.last_hidden_state[:, -1:]
        head = model.lm_head(hidden * model.config.d_model**-0.5 if scale else hidden)
        ids = torch.cat([ids, head.argmax(-1)], dim=1)
    return ids[:, 1:]


def forbid_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise AssertionError("torch runs a stack")

    monkeypatch.setattr(T5Stack, "forward", stop)


def decoder_call(pair: Pair, **arguments: Any) -> dict[str, Any]:
    """Arguments of a decoder stack: 3 rows, 5 tokens, 9 source tokens."""
    with torch.no_grad():
        encoded = pair.stock.encoder(sources(), attention_mask=MASK).last_hidden_state
    call = {"input_ids": targets(), "encoder_hidden_states": encoded}
    return call | {"encoder_attention_mask": MASK} | arguments


@torch.no_grad()
def assert_same(pair: Pair, **arguments: Any) -> Any:
    """The decoder stacks of both models give the same; the Fast one's output."""
    call = decoder_call(pair, **arguments)
    stacks = pair.stock.decoder, pair.fast.decoder
    expected, found = (stack(**copy.deepcopy(call)) for stack in stacks)
    assert found.keys() == expected.keys()
    for name in ("last_hidden_state", "hidden_states"):
        torch.testing.assert_close(found.get(name), expected.get(name), **CLOSE)
    return found


# A program's own loop


@pytest.mark.parametrize("name", ["t5-1.0", "byt5", "mt5", "umt5", "t5-untied-scaled"])
def test_an_own_loop_chooses_the_same_tokens(name: str) -> None:
    pair = build_pair(name)
    found = loop(pair.fast, 8)
    with torch.no_grad():
        call = {"input_ids": sources(), "attention_mask": MASK, "max_new_tokens": 8}
        whole = pair.fast.generate(**call, eos_token_id=None)[:, 1:]
    if pair.stock.config.num_layers >= pair.stock.config.num_decoder_layers:  # see modes.generate
        assert found.tolist() == loop(pair.stock, 8).tolist()
    assert found.tolist() == whole.tolist()


def test_an_own_loop_runs_on_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the first bucket too, and without a KV cache."""
    pair = build_pair("t5-1.0")
    expected = loop(pair.stock, 70)
    forbid_torch(monkeypatch)
    assert loop(pair.fast, 70).tolist() == expected.tolist()
    assert loop(pair.fast, 6, hand_on=False).tolist() == expected[:, :6].tolist()
    assert loop(pair.fast, 6, output_hidden_states=True).tolist() == expected[:, :6].tolist()


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_cache": False},
        {"output_hidden_states": True},
        {"attention_mask": torch.ones(3, 5)},
        {"encoder_attention_mask": None},
        {"return_dict": True},
    ],
    ids=str,
)
def test_the_decoder_stack_alone(name: str, changes: dict[str, Any]) -> None:
    pair = build_pair(name)
    with torch.no_grad():
        assert pair.fast.decoder.refusal(**decoder_call(pair, **changes)) is None
    assert_same(pair, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_mask": torch.tensor([[0, 0, 1, 1, 1]] * 3)}, "attention_mask"),
        ({"encoder_hidden_states": None, "encoder_attention_mask": None}, "encoder_hidden_states"),
        ({"input_ids": None, "inputs_embeds": torch.ones(3, 5, 32)}, "inputs_embeds"),
        ({"output_hidden_states": [0]}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({CACHE: EncoderDecoderCache(DynamicCache(), DynamicCache())}, "EncoderDecoderCache"),
        ({"is_causal": False}, "is_causal"),
    ],
    ids=str,
)
def test_torch_serves(changes: dict[str, Any], reason: str) -> None:
    pair = build_pair("t5-1.1")
    with torch.no_grad():
        found = pair.fast.decoder.refusal(**decoder_call(pair, **changes))
    assert reason in str(found)
    assert_same(pair, **changes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_ids": None},
        {"inputs_embeds": torch.ones(3, 5, 32)},
        {"input_ids": targets() + 1000},
        {"input_ids": targets()[:2]},
        {"encoder_hidden_states": torch.ones(3, 9, 31)},
        {"encoder_attention_mask": MASK[:, :4]},
    ],
    ids=str,
)
def test_wrong_arguments_give_the_error_of_torch(wrong: dict[str, Any]) -> None:
    pair = build_pair("t5-1.1")
    call = decoder_call(pair) | wrong
    with torch.no_grad(), pytest.raises(Exception) as expected:
        pair.stock.decoder(**call)
    with torch.no_grad(), pytest.raises(expected.type):
        pair.fast.decoder(**call)


def test_gradients_of_what_it_attends_to_are_kept() -> None:
    pair = copy.deepcopy(build_pair("t5-1.1"))
    pair.fast.requires_grad_(False)
    call = decoder_call(pair)
    call["encoder_hidden_states"].requires_grad_()
    pair.fast.decoder(**call).last_hidden_state.sum().backward()
    assert call["encoder_hidden_states"].grad.abs().sum() > 0


# One KV cache for whole model, stack and torch

ENDS = ("whole", "stack", "hidden states", "torch")


@torch.no_grad()
def continued(model: Any, pair: Pair, past: Any, ids: torch.Tensor, by: str) -> tuple[Any, Any]:
    """Logits of further tokens, and the KV cache."""
    call = decoder_call(pair, input_ids=ids, use_cache=True, **{CACHE: past})
    if by == "torch":
        call["is_causal"] = True  # an argument that no graph knows
    if by == "whole":
        encoded = {"encoder_outputs": (call["encoder_hidden_states"],), "attention_mask": MASK}
        output = model(decoder_input_ids=ids, use_cache=True, **{CACHE: past}, **encoded)
        return output.logits, output[CACHE]
    output = model.decoder(**call, output_hidden_states=by == "hidden states")
    return model.lm_head(output.last_hidden_state), output[CACHE]


@pytest.mark.parametrize("then", ENDS)
@pytest.mark.parametrize("first", ENDS[:3])
def test_a_kv_cache_goes_from_one_to_the_other(first: str, then: str) -> None:
    pair = build_pair("t5-1.1")
    expected = logits(pair.stock, attention_mask=MASK)
    ids = targets()
    start, past = continued(pair.fast, pair, None, ids[:, :3], first)
    assert isinstance(past, StaticKVCache)
    step, past = continued(pair.fast, pair, past, ids[:, 3:4], then)
    last, past = continued(pair.fast, pair, past, ids[:, 4:], first)
    torch.testing.assert_close(torch.cat([start, step, last], dim=1), expected, **CLOSE)


def test_another_source_mask_is_not_overlooked() -> None:
    pair = build_pair("t5-1.1")
    with torch.no_grad():
        past = pair.fast.decoder(**decoder_call(pair, use_cache=True))[CACHE]
        call = decoder_call(pair, encoder_attention_mask=None, **{CACHE: past})
        assert "encoder_attention_mask" in pair.fast.decoder.refusal(**call)


# What usual calls do not pay for


def test_usual_calls_build_no_more_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    engine_for = EngineModule._engine_for

    def spy(self: Any, name: str, *arguments: Any) -> Any:
        built.append(name)
        return engine_for(self, name, *arguments)

    monkeypatch.setattr(EngineModule, "_engine_for", spy)
    model: Any = copy.deepcopy(build_pair("t5-1.1").fast)
    model.compile_engine()
    model.generate(sources(), max_new_tokens=4, num_beams=2)
    logits(model)
    assert sorted(built) == ["cross", "decoder-masked", "encoder"]
    logits(model, output_hidden_states=True)
    model.generate(
        sources(), max_new_tokens=4, output_hidden_states=True, return_dict_in_generate=True
    )
    assert sorted(built[3:]) == ["decoder-masked-states", "encoder-states"]


def test_further_graphs_hold_no_weights_a_second_time() -> None:
    """As the usual decoder graph may on a CPU (``EngineOptions.prepack``)."""
    model: Any = build_pair("t5-1.1").fast
    whole, stack = model._current_engine(), model.decoder._current_engine()
    usual = whole.decoder(False, 64)
    assert usual.copied
    for engine in (whole.decoder(False, 64, True), stack.decoder(False, 64)):
        assert not engine.copied


# When weights or forwards change


def test_edits_of_the_decoder_are_seen() -> None:
    pair = copies("t5-1.1")
    before = assert_same(pair).last_hidden_state
    with torch.no_grad():
        for model in (pair.stock, pair.fast):
            model.decoder.block[0].layer[2].DenseReluDense.wo.weight.mul_(2)
    assert not torch.allclose(assert_same(pair).last_hidden_state, before)


def test_a_decoder_stack_with_a_forward_of_its_own_is_called() -> None:
    pair = copies("t5-1.1")
    for model in (pair.stock, pair.fast):
        stack = model.decoder

        def doubled(*arguments: Any, stack: Any = stack, **named: Any) -> Any:
            output = type(stack).forward(stack, *arguments, **named)
            output.last_hidden_state *= 2
            return output

        stack.forward = doubled
    assert "forward" in str(refusal(pair.fast))
    torch.testing.assert_close(logits(pair.fast), logits(pair.stock), **CLOSE)


def test_hidden_states_have_the_dtypes_of_the_stock_stack() -> None:
    """float16 holds no sum as large as the residual stream's; stock clamps what it holds."""
    states = [torch.full((1, 1, 2), 1e5), torch.full((1, 1, 2), -1e5), torch.ones(1, 1, 2).half()]
    stack: Any = torch.nn.Linear(2, 2).half()
    found = as_stock(stack, states)
    assert [state.dtype for state in found] == [torch.float16] * 3
    assert [state[0, 0, 0].item() for state in found] == [65504, -65504, 1]
    stack.wo = torch.nn.Linear(2, 2)
    assert [state.dtype for state in as_stock(stack, states)] == [
        torch.float16,
        torch.float32,
        torch.float16,
    ]
