"""The classes whose own code is the stock class's, over stacks on the engine: every head."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Stack

import fastgen
from fastgen.hf.cache import StaticKVCache
from fastgen.hf.contract import CACHE
from fastgen.tasks.decoder import FastDecoder
from tests.configs import TINY, Pair
from tests.helpers import CAUSAL, CLOSE, sources, targets

FAMILIES = ("T5", "MT5", "UMT5")
HEADS = ("Model", "EncoderModel")
HEADS += tuple(f"For{task}" for task in ("SequenceClassification", "TokenClassification"))
HEADS += ("ForQuestionAnswering",)
CLASSES = [f"{family}{head}" for family in FAMILIES for head in HEADS]
CONFIG = TINY | {"num_decoder_layers": 3, "feed_forward_proj": "gated-gelu"}


@functools.cache
def build(name: str) -> Pair:
    """One saved checkpoint with random weights as both classes, fp32 on the CPU."""
    stock_class: Any = getattr(transformers, name)
    labels = 2 if "Question" in name else 3
    stock = stock_class(stock_class.config_class(**CONFIG, num_labels=labels)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in stock.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(("layer_norm" in key) + scale * noise)
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        fast = getattr(fastgen, f"Fast{name}").from_pretrained(folder)
        return Pair(stock_class.from_pretrained(folder).eval(), fast.eval())


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """Ragged sources, each with one eos at its end; decoder tokens where the class needs them."""
    keep = torch.arange(9) < torch.tensor([[9], [6], [2]])
    ids = sources() * keep
    ids[torch.arange(3), keep.sum(1) - 1] = TINY["eos_token_id"]
    given = {"input_ids": ids, "attention_mask": keep.long()}
    if name.endswith("5Model"):
        given["decoder_input_ids"] = targets()
    return given | arguments


def causal(name: str) -> bool:
    """Whether the stock decoder stack sees no later tokens (see ``CAUSAL``)."""
    return not name.startswith("UMT5") or "umt5" in CAUSAL or not has_decoder(name)


def has_decoder(name: str) -> bool:
    return any(isinstance(part, FastDecoder) for part in build(name).fast.modules())


def assert_same(pair: Pair, arguments: dict[str, Any]) -> Any:
    """All tensors of both models' outputs are close; the Fast output."""
    with torch.no_grad():
        expected, found = pair.stock(**arguments), pair.fast(**arguments)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if not isinstance(value, transformers.Cache):
            torch.testing.assert_close(found[key], value, **CLOSE)
    return found


@pytest.mark.parametrize(
    ("name", "states"),
    [*((name, True) for name in CLASSES), *((name, False) for name in CLASSES[: len(HEADS)])],
)
def test_same_outputs(name: str, states: bool) -> None:
    pair, arguments = build(name), call(name, output_hidden_states=states)
    with torch.no_grad():
        reason = pair.fast.refusal(**arguments)
    assert reason is None if causal(name) else "later tokens" in reason
    found = assert_same(pair, arguments)
    fields = {key for key in found if key.endswith("hidden_states")}
    decodes = {"encoder_hidden_states", "decoder_hidden_states"}
    assert fields == ((decodes if has_decoder(name) else {"hidden_states"}) if states else set())


@pytest.mark.parametrize("name", CLASSES[: len(HEADS)])
def test_both_stacks_run_on_the_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise AssertionError("torch runs a stack")

    monkeypatch.setattr(T5Stack, "forward", stop)
    with torch.no_grad():
        build(name).fast(**call(name))


def test_the_loss_is_computed_by_the_stock_head() -> None:
    for task, labels in (("Sequence", torch.tensor([0, 2, 1])), ("Token", sources() % 3)):
        name = f"T5For{task}Classification"
        assert assert_same(build(name), call(name, labels=labels)).loss > 0
    positions = {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([5] * 3)}
    name = "T5ForQuestionAnswering"
    assert assert_same(build(name), call(name, **positions)).loss > 0


def test_a_kv_cache_of_the_model_without_a_head_goes_on() -> None:
    pair, arguments = build("T5Model"), call("T5Model", use_cache=True)
    assert isinstance(assert_same(pair, arguments)[CACHE], StaticKVCache)
    found = []
    for model in (pair.stock, pair.fast):
        with torch.no_grad():
            whole = model(**arguments)
            ids = arguments["decoder_input_ids"]
            first = model(**arguments | {"decoder_input_ids": ids[:, :3]})
            given = {"decoder_input_ids": ids[:, 3:], CACHE: first[CACHE]}
            second = model(**arguments | given)
        assert second[CACHE] is first[CACHE]
        found.append(torch.cat([first[0], second[0]], dim=1))
        torch.testing.assert_close(found[-1], whole[0], **CLOSE)
    torch.testing.assert_close(*found, **CLOSE)


def test_refusals_say_what_torch_runs() -> None:
    model: Any = build("T5ForSequenceClassification").fast
    arguments = call("T5ForSequenceClassification")
    with torch.no_grad():
        for given, reason in (
            ({"output_attentions": True}, "output_attentions"),
            ({"inputs_embeds": torch.ones(3, 9, 32)}, "inputs_embeds"),
            ({"decoder_attention_mask": torch.zeros(3, 9)}, "attention_mask"),
            ({"attention_mask": torch.ones(3, 1, 9, 9)}, "attention_mask"),
            ({"unheard_of": 1}, "unheard_of"),
        ):
            assert reason in model.refusal(**arguments | given)
        assert model.refusal(labels=torch.tensor([0, 1, 2]), **arguments) is None
        encoded = {"encoder_outputs": (torch.ones(3, 9, 32),)}
        assert model.refusal(**arguments | encoded) is None
    assert "gradients" in model.refusal(**arguments)


@pytest.mark.parametrize("name", ["T5ForSequenceClassification", "UMT5ForTokenClassification"])
def test_life_of_a_class_with_a_head(name: str, tmp_path: Path) -> None:
    """Options, copies, pickles, checkpoints, an edit of the weights and a way back to torch."""
    pair, arguments = copy.deepcopy(build(name)), call(name)
    fast: Any = pair.fast
    fast.compile_engine()
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    with torch.no_grad():
        expected = fast(**arguments).logits
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert type(other) is type(fast)
            torch.testing.assert_close(other(**arguments).logits, expected)
        options = {"backend": "torch"}
        other = type(fast).from_pretrained(tmp_path, engine_options=options).eval()
        assert not causal(name) or "backend='torch'" in other.refusal(**arguments)
        torch.testing.assert_close(other(**arguments).logits, expected, **CLOSE)
        for model in (pair.stock, fast):
            for key, parameter in model.named_parameters():
                if key.endswith("final_layer_norm.weight"):
                    parameter.mul_(2)
    assert not torch.allclose(assert_same(pair, arguments).logits, expected)


def test_gradients_reach_the_weights() -> None:
    pair = copy.deepcopy(build("T5ForTokenClassification"))
    arguments = call("T5ForTokenClassification", labels=sources() % 3)
    for model in (pair.stock, pair.fast):
        model(**arguments).loss.backward()
    own = dict(pair.stock.named_parameters())
    for key, parameter in pair.fast.named_parameters():
        torch.testing.assert_close(parameter.grad, own[key].grad)
