"""GPT-2 without a language model head, and its classifiers, against the stock classes."""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2Model

import fastgen
from fastgen.hf import trial
from fastgen.hf.contract import CACHE
from tests.configs import Pair
from tests.models.test_bert import CLOSE, kept

HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification")
TINY = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24}
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "scales": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    "relu": {"activation_function": "relu", "n_inner": 40, "layer_norm_epsilon": 1e-3},
}


@functools.cache
def build(head: str, variant: str = "tiny", **options: Any) -> Pair:
    """One saved checkpoint with random weights as both classes, fp32 on the CPU."""
    stock_class: Any = getattr(transformers, f"GPT2{head}")
    config = GPT2Config(**TINY | VARIANTS[variant], num_labels=5, pad_token_id=0)
    stock = stock_class(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in stock.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.ndim == 1 else parameter.shape[0] ** -0.5
            parameter.copy_((".ln_" in key and "weight" in key) + scale * noise)
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        fast_class = getattr(fastgen, f"FastGPT2{head}")
        fast = fast_class.from_pretrained(folder, engine_options=options or None)
        return Pair(stock_class.from_pretrained(folder).eval(), fast.eval())


def call(padding: str | None = "right", **more: Any) -> dict[str, Any]:
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    if padding is None:
        return {"input_ids": ids, **more}
    mask = kept(padding).long()
    return {"input_ids": ids * mask, "attention_mask": mask, **more}


def assert_same(pair: Pair, arguments: dict[str, Any]) -> Any:
    """All tensors of both models' outputs are close, but what is computed at padding and what the
    stock class keeps for a next call; the Fast output."""
    with torch.no_grad():
        expected, found = pair.stock(**arguments), pair.fast(**arguments)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys() - ({CACHE} if CACHE in expected else set())
    mask = arguments.get("attention_mask", torch.ones(3, 9)).bool()

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[mask] if tensor.shape[:-1] == mask.shape else tensor

    for key, own in found.items():
        both = (own, expected[key])
        for one, right in zip(*both, strict=True) if isinstance(own, tuple) else [both]:
            assert one.dtype == right.dtype and one.shape == right.shape
            torch.testing.assert_close(seen(one), seen(right), **CLOSE)
    return found


def stack_of(model: Any) -> Any:
    return model if isinstance(model, GPT2Model) else model.transformer


@pytest.mark.parametrize("states", [False, True], ids=["output", "states"])
@pytest.mark.parametrize("padding", [None, "full", "right", "left", "holes"])
@pytest.mark.parametrize("head", HEADS)
def test_same_outputs(head: str, padding: str | None, states: bool) -> None:
    pair, arguments = build(head), call(padding, output_hidden_states=states)
    with torch.no_grad():
        assert pair.fast.refusal(**arguments) is None
        assert pair.fast.explain(**arguments).path == "engine"
    found = assert_same(pair, arguments)
    assert stack_of(pair.fast)._engine is not None
    assert len(found.get("hidden_states", ())) == 4 * states


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    assert_same(build("Model", variant), call(output_hidden_states=True))


@pytest.mark.parametrize("head", HEADS)
def test_the_layers_run_on_the_engine(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise AssertionError("torch runs it")

    monkeypatch.setattr(transformers.models.gpt2.modeling_gpt2.GPT2Block, "forward", stop)
    with torch.no_grad():
        build(head).fast(**call())


def test_losses_are_those_of_the_stock_heads() -> None:
    tokens = torch.randint(0, 5, (3, 9), generator=torch.Generator().manual_seed(4))
    for head, labels in (
        ("ForSequenceClassification", torch.tensor([0, 4, 2])),
        ("ForTokenClassification", tokens.masked_fill(~kept("right"), -100)),
    ):
        assert assert_same(build(head), call(labels=labels)).loss > 0


def test_the_last_token_is_found_by_its_id() -> None:
    """Also where the mask hides it; without an id of padding it is a single row's last place."""
    pair = build("ForSequenceClassification")
    arguments = call("full")
    arguments["attention_mask"] = kept("right").long()
    assert_same(pair, arguments)
    pair = copy.deepcopy(pair)
    for model in (pair.stock, pair.fast):
        model.config.pad_token_id = None
    assert_same(pair, {name: value[1:2] for name, value in arguments.items()})
    for model in (pair.stock, pair.fast):
        with torch.no_grad(), pytest.raises(ValueError, match="batch sizes"):
            model(**arguments)


def test_padding_is_zeros_unless_it_is_asked_for() -> None:
    with torch.no_grad():
        hidden = build("Model").fast(**call("right")).last_hidden_state
        assert torch.equal(hidden.any(-1), kept("right"))
        pair = build("Model", skip_padding=False)
        expected, found = (m(**call("right")).last_hidden_state for m in (pair.stock, pair.fast))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_refusals_say_what_torch_runs() -> None:
    for head in HEADS:
        fast: Any = build(head).fast
        with torch.no_grad():
            for given, reason in (
                ({"use_cache": True}, "FastGPT2LMHeadModel"),
                ({"position_ids": torch.arange(9)[None]}, "position_ids"),
                ({"token_type_ids": torch.ones(3, 9, dtype=torch.int64)}, "token_type_ids"),
                ({"output_attentions": True}, "output_attentions"),
                ({"inputs_embeds": torch.ones(3, 9, 32)}, "inputs_embeds"),
                ({"attention_mask": torch.ones(3, 1, 9, 9)}, "attention_mask"),
                ({"attention_mask": torch.zeros(3, 9)}, "hides all of a row"),
                ({"unheard_of": 1}, "unheard_of"),
            ):
                assert reason in str(fast.refusal(**call() | given)), given
            long = torch.ones(1, 25, dtype=torch.int64)
            assert "24 positions" in fast.refusal(input_ids=long)
        assert "gradients" in fast.refusal(**call())


@pytest.mark.parametrize("head", HEADS)
def test_torch_gives_what_stock_gives(head: str) -> None:
    pair = build(head)
    for changes in (
        {"use_cache": True},
        {"position_ids": torch.arange(8, -1, -1)[None]},
        {"token_type_ids": torch.ones(3, 9, dtype=torch.int64)},
        {"attention_mask": torch.tril(torch.ones(3, 1, 9, 9)).bool()},
    ):
        with torch.no_grad():
            expected, found = (m(**call() | changes) for m in (pair.stock, pair.fast))
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found[0], expected[0], **CLOSE)
    for model in (pair.stock, pair.fast):
        with torch.no_grad(), pytest.raises(IndexError):
            model(torch.ones(1, 25, dtype=torch.int64))


def test_what_is_kept_goes_on() -> None:
    """A cache of torch's, by an explicit ``use_cache``."""
    pair, ids = build("Model"), call(None)["input_ids"]
    with torch.no_grad():
        expected = pair.stock(ids).last_hidden_state[:, 5:]
        first = pair.fast(ids[:, :5], use_cache=True)
        found = pair.fast(ids[:, 5:], **{CACHE: first[CACHE]}, use_cache=True)
    torch.testing.assert_close(found.last_hidden_state, expected, **CLOSE)


@pytest.mark.parametrize("head", HEADS)
def test_life_of_a_model(head: str, tmp_path: Path) -> None:
    """Copies, pickles, checkpoints, auto classes, an edit of the weights."""
    pair = copy.deepcopy(build(head))
    fast: Any = pair.fast
    fast.compile_engine()
    fast.save_pretrained(tmp_path)
    assert type(fast).__name__ == f"GPT2{head}" and repr(fast).startswith(f"FastGPT2{head}(")
    auto = getattr(fastgen, f"FastAutoModel{head.removeprefix('Model')}")
    with torch.no_grad():
        expected = fast(**call())[0]
        for other in (
            copy.deepcopy(fast),
            pickle.loads(pickle.dumps(fast)),
            auto.from_pretrained(tmp_path).eval(),
        ):
            assert type(other) is type(fast)
            torch.testing.assert_close(other(**call())[0], expected)
        for model in (pair.stock, fast):
            stack_of(model).h[1].mlp.c_fc.bias.add_(0.5)
    assert not torch.allclose(assert_same(pair, call())[0], expected)


def test_gradients_reach_the_weights() -> None:
    pair = copy.deepcopy(build("ForSequenceClassification"))
    for model in (pair.stock, pair.fast):
        model(**call(labels=torch.tensor([0, 1, 2]))).loss.backward()
    own = dict(pair.stock.named_parameters())
    for key, parameter in pair.fast.named_parameters():
        torch.testing.assert_close(parameter.grad, own[key].grad)


def test_a_version_not_met_is_tried() -> None:
    assert trial._try(fastgen.FastGPT2Model) == {"forward": "fast loop"}
