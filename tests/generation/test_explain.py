"""``model.explain``: the path that a ``generate`` call takes, and why."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig
from transformers.activations import ACT2FN
from transformers.models.t5.modeling_t5 import T5Stack

from fastgen import FastT5
from fastgen.hf.contract import CACHE
from tests.configs import TINY, build_pair
from tests.helpers import copies, sources, targets

MASK = torch.ones(3, 9, dtype=torch.int64)
ENGINE = ("fast loop", "HF loop")

#: Arguments of ``generate``, the path they take (or one of two), and a word of the reason.
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "greedy": ({}, ENGINE, ""),
    "mask": ({"attention_mask": MASK}, ENGINE, ""),
    "sample": ({"do_sample": True, "top_k": 5}, ENGINE, ""),
    "beams": ({"num_beams": 3}, ENGINE, ""),
    "config object": ({"generation_config": GenerationConfig(num_beams=2)}, ENGINE, ""),
    "assisted": ({"input_ids": sources()[:1], "prompt_lookup_num_tokens": 2}, ("HF loop",), ""),
    "no KV cache": ({"use_cache": False}, ("HF loop",), "use_cache"),
    "attentions": ({"output_attentions": True}, ("torch",), "output_attentions"),
    "hidden states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        ("HF loop",),
        "output_hidden_states",
    ),
    "hidden states dropped": ({"output_hidden_states": True}, ENGINE, ""),
    "static": ({"cache_implementation": "static"}, ("torch",), "cache_implementation='static'"),
    "stock KV cache": (
        {CACHE: EncoderDecoderCache(DynamicCache(), DynamicCache())},
        ("torch",),
        "EncoderDecoderCache",
    ),
}


@contextmanager
def decoder_runs_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the calls of the stock decoder stack's forward."""
    runs: list[int] = []
    forward = T5Stack.forward

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.is_decoder:
            runs.append(1)
        return forward(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(T5Stack, "forward", counted)
        yield runs


@pytest.mark.parametrize("case", CASES)
def test_generate_takes_the_path_that_explain_names(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, paths, reason = CASES[case]
    model: Any = build_pair("t5-1.1").fast
    call = {"input_ids": sources(), "max_new_tokens": 5, "min_new_tokens": 5} | changes
    explanation = model.explain(**copy.deepcopy(call))
    assert explanation.path in paths
    assert any(reason in line for line in explanation.reasons) or not reason
    if explanation.path != "fast loop":
        assert explanation.reasons, "a slower path has a reason"
    with decoder_runs_of_torch(monkeypatch) as runs:
        model.generate(**copy.deepcopy(call))
    assert bool(runs) == (explanation.path == "torch")


def test_embeddings_are_encoded_by_torch_and_decoded_by_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = build_pair("t5-1.1").fast
    call = {"inputs_embeds": torch.ones(3, 9, TINY["d_model"]), "max_new_tokens": 5}
    with decoder_runs_of_torch(monkeypatch) as runs:
        model.generate(**call)
    assert not runs
    assert model.explain(**call).path in ENGINE


def use_mish(model: Any) -> None:
    model.config.dense_act_fn = "mish"
    for module in list(model.modules()):
        if hasattr(module, "wo"):
            module.act = ACT2FN["mish"].eval()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "model.eval()"),
        (lambda model: model.double(), "float64"),
        (lambda model: setattr(model, "engine_options", {"backend": "torch"}), "backend='torch'"),
        (lambda model: model.lm_head.register_forward_hook(lambda *_: None), "hooks"),
        (lambda model: model.register_parameter("lora", torch.nn.Parameter(torch.ones(1))), "lora"),
        (use_mish, "dense_act_fn='mish'"),
        (lambda model: setattr(model.config, "dense_act_fn", "mish"), "not a MishActivation"),
    ],
    ids=["training", "dtype", "options", "hook", "parameter", "activation", "config"],
)
def test_torch_serves_a_model_for_a_reason(change: Any, reason: str) -> None:
    model = copies().fast
    change(model)
    model.invalidate_engine()
    explanation = model.explain(input_ids=sources())
    assert explanation.path == "torch"
    assert any(reason in line for line in explanation.reasons)


def test_options_choose_the_hf_loop() -> None:
    model = copies().fast
    model.engine_options = {"fast_loop": False}
    explanation = model.explain(input_ids=sources())
    assert explanation.path == "HF loop"
    assert any("fast_loop=False" in line for line in explanation.reasons)


def test_it_reads_as_text() -> None:
    model = build_pair("t5-1.1").fast
    text = str(model.explain(input_ids=sources(), output_attentions=True))
    assert text.splitlines()[0] == "torch"
    assert text.splitlines()[1].startswith("  - ")


def test_it_may_be_asked_before_there_are_inputs() -> None:
    model = build_pair("t5-1.1").fast
    assert model.explain().path in ENGINE
    assert model.explain(num_beams=4, max_new_tokens=200).path in ENGINE
    assert model.explain(decoder_input_ids=targets()).path in ENGINE


def test_asking_changes_nothing() -> None:
    model: Any = build_pair("t5-1.1").fast
    call = {"input_ids": sources(), "do_sample": True, "generation_config": GenerationConfig()}
    keys, before = list(call), model.generation_config.to_dict()
    state = torch.get_rng_state()
    model.explain(**call)
    assert list(call) == keys
    assert call["generation_config"].to_dict() == GenerationConfig().to_dict()
    assert model.generation_config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_on_a_device_without_engine_says_so() -> None:
    with torch.device("meta"):
        model = FastT5(copy.deepcopy(build_pair("t5-1.1").fast.config)).eval()
    assert "meta" in str(model.explain())
