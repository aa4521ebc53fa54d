"""``explain_forward``, and ``explain`` of models that do not generate: what serves ``forward``."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Stack

from fastgen import FastT5EncoderModel, FastT5ForSequenceClassification, FastT5Model
from tests.configs import TINY, build_pair
from tests.helpers import copies, sources, targets

EMBEDS = torch.ones(3, 9, TINY["d_model"])
MASK = torch.ones(3, 9, dtype=torch.int64)
ENDED = torch.cat([sources(), torch.ones(3, 1, dtype=torch.int64)], dim=1)  # by eos
HIDING = torch.tensor([[1, 1, 1, 1, 0]] * 3)


@contextmanager
def runs_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each stack that torch runs is a decoder."""
    runs: list[bool] = []
    forward = T5Stack.forward

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        runs.append(bool(self.is_decoder))
        return forward(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(T5Stack, "forward", counted)
        yield runs


def model_of(kind: type) -> Any:
    return kind(copy.deepcopy(build_pair("t5-1.1").fast.config)).eval()


#: A module, the arguments of its ``forward``, the stacks that torch runs, and a word of the reason.
BOTH = {"input_ids": sources(), "decoder_input_ids": targets()}
CASES: dict[str, tuple[Any, dict[str, Any], list[bool], str]] = {
    "whole": (build_pair, BOTH, [], ""),
    "labels": (build_pair, BOTH | {"decoder_input_ids": None, "labels": targets()}, [], ""),
    "masked": (build_pair, BOTH | {"decoder_attention_mask": HIDING}, [True], "hides tokens"),
    "embeds": (build_pair, BOTH | {"input_ids": None, "inputs_embeds": EMBEDS}, [False], "embeds"),
    "encoder stack": (None, {"input_ids": sources(), "attention_mask": MASK}, [], ""),
    "encoder stack embeds": (None, {"inputs_embeds": EMBEDS}, [False], "inputs_embeds"),
    "encoder": (FastT5EncoderModel, {"input_ids": sources()}, [], ""),
    "encoder embeds": (FastT5EncoderModel, {"inputs_embeds": EMBEDS}, [False], "inputs_embeds"),
    "no head": (FastT5Model, BOTH, [], ""),
    "attentions": (FastT5Model, BOTH | {"output_attentions": True}, [False, True], "attentions"),
    "classes": (FastT5ForSequenceClassification, {"input_ids": ENDED}, [], ""),
}


def module_of(kind: Any) -> Any:
    fast = build_pair("t5-1.1").fast
    return {None: fast.encoder, build_pair: fast}.get(kind) or model_of(kind)


@pytest.mark.parametrize("case", CASES)
def test_forward_takes_the_path_that_is_explained(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, call, stacks, reason = CASES[case]
    module = module_of(kind)
    with torch.no_grad():
        explanation = module.explain_forward(**call)
        with runs_of_torch(monkeypatch) as runs:
            module(**call)
    assert runs == stacks
    assert explanation.path == ("torch" if stacks else "engine")
    assert reason in str(explanation) and bool(explanation.reasons) == bool(reason)
    if not hasattr(module, "lm_head"):  # else it generates, too
        with torch.no_grad():
            assert module.explain(**call) == explanation


def test_what_is_left_out_is_taken_to_be_served() -> None:
    for kind in {kind for kind, *_ in CASES.values()}:
        module = module_of(kind)
        with torch.no_grad():
            assert str(module.explain_forward()) == "engine"
            assert str(module.explain_forward(attention_mask=MASK)) == "engine"
    whole = build_pair("t5-1.1").fast
    with torch.no_grad():
        assert str(whole.explain_forward(decoder_input_ids=targets())) == "engine"
        assert str(whole.decoder.explain_forward(encoder_hidden_states=EMBEDS)) == "engine"


def test_gradients_are_named_as_they_are_here_and_now() -> None:
    for module in (build_pair("t5-1.1").fast, model_of(FastT5EncoderModel)):
        explanation = module.explain_forward(input_ids=sources())
        assert explanation.path == "torch" and "torch.no_grad()" in str(explanation)
        assert module.eval().requires_grad_(False).explain_forward().path == "engine"
        module.requires_grad_(True)


def test_an_encoder_that_torch_runs_is_named_beside_a_decoder_on_the_engine() -> None:
    model: Any = copies().fast
    model.encoder.block[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        found = model.explain_forward(**BOTH)
        assert found.path == "torch" and "hook" in str(found)
        encoded = model.encoder(input_ids=sources())
        arguments = {"encoder_outputs": encoded, "decoder_input_ids": targets()}
        assert model.explain_forward(**arguments).path == "engine"


def test_a_model_that_generates_explains_generate() -> None:
    assert build_pair("t5-1.1").fast.explain(num_beams=2).path in ("fast loop", "HF loop")
