"""BART: its heads, tokens that are implied, a buffer among the weights, and where positions end."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers.models.bart.modeling_bart import BartDecoder, BartEncoder

import fastgen
from fastgen.hf import trial
from fastgen.hf.cache import StaticKVCache
from fastgen.hf.contract import CACHE
from tests.configs import TINY_BART, Pair, build_pair, prompts
from tests.generation.emulate import gpu_paths
from tests.helpers import CLOSE, ragged, tokens

HEADS = ("Model", "ForSequenceClassification", "ForQuestionAnswering", "ForConditionalGeneration")
POSITIONS = TINY_BART["max_position_embeddings"]
EOS = TINY_BART["eos_token_id"]


@functools.cache
def build(head: str) -> Pair:
    """One saved checkpoint with random weights as both classes, fp32 on the CPU."""
    stock_class: Any = getattr(transformers, f"Bart{head}")
    torch.manual_seed(3)
    changes = {"scale_embedding": True, "decoder_layers": 3}
    stock = stock_class(transformers.BartConfig(**TINY_BART | changes, num_labels=3)).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        fast = getattr(fastgen, f"FastBart{head}").from_pretrained(folder)
        return Pair(stock_class.from_pretrained(folder).eval(), fast.eval())


def call(**arguments: Any) -> dict[str, Any]:
    """Ragged sources, each with one eos at its end."""
    mask = ragged()
    ids = tokens(3, 9, seed=1) * mask
    ids[torch.arange(3), mask.sum(1) - 1] = EOS
    return {"input_ids": ids, "attention_mask": mask} | arguments


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock stacks fail, but for those of stock models."""
    for stack in (BartEncoder, BartDecoder):
        forward = stack.forward

        def checked(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            assert not hasattr(self, "engine_options"), "torch runs a stack"
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(stack, "forward", checked)


@torch.no_grad()
def assert_same(pair: Pair, **arguments: Any) -> Any:
    """All tensors of both models' outputs are close; the Fast output."""
    expected, found = pair.stock(**arguments), pair.fast(**arguments)
    assert found.keys() == expected.keys() and type(found) is type(expected)
    for key, value in expected.items():
        if not isinstance(value, transformers.Cache):
            torch.testing.assert_close(found[key], value, **CLOSE)
    return found


# Heads


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_same_outputs(head: str, states: bool, without_torch: None) -> None:
    """Without tokens for the decoder, which get the sources one place later."""
    pair = build(head)
    found = assert_same(pair, **call(output_hidden_states=states))
    assert ("decoder_hidden_states" in found) == states
    with torch.no_grad():
        assert pair.fast.refusal(**call(output_hidden_states=states)) is None
    assert isinstance(found[CACHE], StaticKVCache)
    assert_same(pair, **call(decoder_input_ids=tokens(3, 9, seed=2)))


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("ForSequenceClassification", {"labels": torch.tensor([0, 2, 1])}),
        (
            "ForQuestionAnswering",
            {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([5] * 3)},
        ),
        ("ForConditionalGeneration", {"labels": tokens(3, 5, seed=2)}),
        (
            "ForConditionalGeneration",
            {"labels": tokens(3, 5, 2).index_fill(1, torch.tensor(3), -100)},
        ),
    ],
)
def test_losses(head: str, labels: dict[str, torch.Tensor], without_torch: None) -> None:
    found = assert_same(build(head), **call(**labels))
    assert found.loss > 0
    assert CACHE not in found  # in training there are no further tokens


def test_a_tuple(without_torch: None) -> None:
    pair = build("ForConditionalGeneration")
    with torch.no_grad():
        stock, fast = (m(**call(), return_dict=False) for m in (pair.stock, pair.fast))
    assert len(stock) == len(fast)
    torch.testing.assert_close(fast[0], stock[0], **CLOSE)
    torch.testing.assert_close(fast[2], stock[2], **CLOSE)


def test_refusals_say_what_torch_runs() -> None:
    for head in HEADS:
        model: Any = build(head).fast
        with torch.no_grad():
            for given, reason in (
                ({"output_attentions": True}, "output_attentions"),
                ({"inputs_embeds": torch.ones(3, 9, 32)}, "inputs_embeds"),
                ({"decoder_attention_mask": torch.zeros(3, 9)}, "attention_mask"),
                ({"attention_mask": torch.ones(3, 1, 9, 9)}, "attention_mask"),
                ({"unheard_of": 1}, "unheard_of"),
            ):
                assert reason in model.refusal(**call() | given)
        assert "gradients" in model.refusal(**call())


def test_sentences_with_several_ends_are_errors_of_the_stock_head() -> None:
    pair, arguments = build("ForSequenceClassification"), call()
    arguments["input_ids"][0, 2] = EOS
    for model in (pair.stock, pair.fast):
        with torch.no_grad(), pytest.raises(ValueError, match="same number of <eos>"):
            model(**arguments)


@torch.no_grad()
def test_a_kv_cache_goes_from_the_stack_to_the_whole_and_on(without_torch: None) -> None:
    pair, ids = build("ForConditionalGeneration"), tokens(3, 7, seed=4)
    found = []
    for model in (pair.stock, pair.fast):
        encoded = model.get_encoder()(**call())
        source = {"encoder_hidden_states": encoded[0], "encoder_attention_mask": ragged()}
        first = model.get_decoder()(input_ids=ids[:, :3], **source, use_cache=True)
        whole = {"encoder_outputs": encoded, "attention_mask": ragged(), "use_cache": True}
        second = model(decoder_input_ids=ids[:, 3:4], **whole, **{CACHE: first[CACHE]})
        third = model(decoder_input_ids=ids[:, 4:], **whole, **{CACHE: second[CACHE]})
        found.append([first[0], second.logits, third.logits])
    torch.testing.assert_close(found[1], found[0], **CLOSE)


# The bias of the logits, a buffer


def in_place(model: Any) -> None:
    model.final_logits_bias[0, 7] += 3


def through_data(model: Any) -> None:
    model.final_logits_bias.data[0, 7] += 3


def replaced(model: Any) -> None:
    model.final_logits_bias = model.final_logits_bias * 3


def resized(model: Any) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(104)


def loaded(model: Any) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["final_logits_bias"] += torch.arange(96) % 5
    model.load_state_dict(state)


@pytest.mark.parametrize("edit", [in_place, through_data, replaced, resized, loaded])
@torch.no_grad()
def test_an_edit_of_the_logits_bias_is_seen(
    edit: Callable[[Any], None], without_torch: None
) -> None:
    pair = copy.deepcopy(build_pair("bart"))
    before = assert_same(pair, **call()).logits
    for model in (pair.stock, pair.fast):
        edit(model)
    after = assert_same(pair, **call()).logits
    assert before.shape != after.shape or not torch.equal(before, after)
    expected, found = (m.generate(**call(), max_new_tokens=6) for m in (pair.stock, pair.fast))
    assert found.tolist() == expected.tolist()


def test_a_bias_of_another_dtype_is_torchs() -> None:
    pair = copy.deepcopy(build_pair("bart"))
    for model in (pair.stock, pair.fast):
        model.final_logits_bias = model.final_logits_bias.double()
    with torch.no_grad():
        reason = pair.fast.refusal(**call(decoder_input_ids=tokens(3, 5, seed=2)))
    assert "final_logits_bias is torch.float64, other weights torch.float32" in str(reason)
    assert assert_same(pair, **call()).logits.dtype == torch.float64


# Where positions end


@pytest.mark.parametrize("source", [POSITIONS, POSITIONS + 1])
@torch.no_grad()
def test_a_source_as_long_as_there_are_positions(source: int) -> None:
    pair, given = build_pair("bart"), {"input_ids": prompts("bart", 2, source)}
    if source <= POSITIONS:
        expected, found = (m.generate(**given, max_new_tokens=4) for m in (pair.stock, pair.fast))
        assert found.tolist() == expected.tolist()
        return
    assert "where there are 96 positions" in str(pair.fast.get_encoder().refusal(**given))
    for model in (pair.stock, pair.fast):
        with pytest.raises(IndexError):
            model.generate(**given, max_new_tokens=4)


@pytest.mark.parametrize("fast_loop", [True, False])
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}])
@pytest.mark.parametrize(("new", "fails"), [(POSITIONS, False), (POSITIONS + 1, True)])
def test_more_tokens_than_there_are_positions(
    new: int, fails: bool, more: dict[str, Any], fast_loop: bool
) -> None:
    """The last new token is never read."""
    pair, found = copy.deepcopy(build_pair("bart")), []
    pair.fast.engine_options = {"fast_loop": fast_loop}
    for model in (pair.stock, pair.fast):
        try:
            given = {"min_new_tokens": new, "max_new_tokens": new, **more}
            found.append(model.generate(prompts("bart", 2), **given).tolist())
        except IndexError:
            found.append(IndexError)
    assert found[0] == found[1]
    assert (found[0] is IndexError) == fails


@torch.no_grad()
def test_a_forward_beyond_the_positions_fails_as_in_the_stock_model() -> None:
    pair = build_pair("bart")
    whole = tokens(3, POSITIONS + 1, seed=5)
    for model in (pair.stock, pair.fast):
        first = model(**call(), decoder_input_ids=whole[:, :-1], use_cache=True)
        encoded = {"encoder_outputs": (first.encoder_last_hidden_state,), **call()}
        for ids, past in ((whole, None), (whole[:, -1:], first[CACHE])):
            with pytest.raises(IndexError):
                model(**encoded, decoder_input_ids=ids, use_cache=True, **{CACHE: past})


# Paths


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["bart", "bart-scales", "bart-sizes"])
def test_the_fast_loop_serves_it_captured_too(name: str, beams: int) -> None:
    pair = copy.deepcopy(build_pair(name))
    given: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 12, **call()}
    assert pair.fast.explain(**given).path == "fast loop"
    expected = pair.stock.generate(**given).tolist()
    with gpu_paths(run_ahead=True) as captured:
        assert pair.fast.generate(**given).tolist() == expected
    assert captured


@pytest.mark.parametrize(
    "name", ["FastBartEncoder", "FastBartDecoder", "FastBartForConditionalGeneration"]
)
def test_a_trial_runs_the_engine(name: str) -> None:
    """What a version of transformers that nobody has met is tried with."""
    fast = getattr(fastgen.models.bart, name)
    verdict = trial._try(fast)
    kinds = {"forward"} if "Conditional" not in name else {"forward", *trial._CALLS}
    assert verdict.keys() == kinds
    assert set(verdict.values()) <= {"fast loop", "HF loop"}
