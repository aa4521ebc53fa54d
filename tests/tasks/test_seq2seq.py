"""``forward`` of encoder-decoder models by hand, argument by argument, against the stock class."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from tests.configs import Pair, build_pair
from tests.helpers import CAUSAL, CLOSE, ragged, refusal, sources, targets, tokens

NAMES = (*CAUSAL, "t5-deep-decoder")


@torch.no_grad()
def forward(model: Any, **arguments: Any) -> Any:
    """A forward call of 3 rows, 9 source and 5 target tokens unless said."""
    call = {"input_ids": sources(), "decoder_input_ids": targets()} | arguments
    return model(**{name: value for name, value in call.items() if value is not ...})


def assert_same(pair: Pair, **arguments: Any) -> Any:
    """Same logits and hidden states, and the same entries, of both models; the Fast output."""
    expected, found = forward(pair.stock, **arguments), forward(pair.fast, **arguments)
    assert found.keys() == expected.keys()
    assert found.logits.dtype == expected.logits.dtype
    states = "encoder_last_hidden_state", "encoder_hidden_states", "decoder_hidden_states"
    for name in ("logits", "loss", *states):
        torch.testing.assert_close(found.get(name), expected.get(name), **CLOSE)
    return found


# Arguments that the engine serves

SERVED: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "padding on the right": {"attention_mask": ragged("right")},
    "padding on the left": {"attention_mask": ragged("left")},
    "bool mask": {"attention_mask": ragged().bool()},
    "float mask": {"attention_mask": ragged().float()},
    "int32": {"input_ids": sources().int(), "decoder_input_ids": targets().int()},
    "int32 step": {"decoder_input_ids": targets()[:, :1].int()},
    "not contiguous": {
        "input_ids": sources().t().contiguous().t(),
        "decoder_input_ids": targets().t().contiguous().t(),
    },
    "one target token": {"decoder_input_ids": targets()[:, :1]},
    "one source token": {"input_ids": sources()[:, :1]},
    "one row": {"input_ids": sources()[:1], "decoder_input_ids": targets()[:1]},
    "long": {"input_ids": tokens(2, 200, 1), "decoder_input_ids": tokens(2, 150, 2)},
    "decoder mask of ones": {"decoder_attention_mask": torch.ones_like(targets())},
    "use_cache=False": {"use_cache": False},
    "use_cache=True": {"use_cache": True},
    "hidden states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("case", SERVED)
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_serves(name: str, case: str) -> None:
    pair = build_pair(name)
    assert refusal(pair.fast, **SERVED[case]) is None
    assert_same(pair, **SERVED[case])


# Arguments that torch serves

TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "attentions": ("output_attentions", {"output_attentions": True}),
    "hidden states of a layer": ("output_hidden_states", {"output_hidden_states": [1]}),
    "hidden decoder tokens": (
        "decoder_attention_mask",
        {"decoder_attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])},
    ),
    "4-D decoder mask": (
        "decoder_attention_mask",
        {"decoder_attention_mask": torch.ones(3, 1, 5, 5, dtype=torch.bool)},
    ),
    "one source for all": ("rows", {"input_ids": sources()[:1]}),
}


@pytest.mark.parametrize("case", TORCH)
def test_torch_serves(case: str) -> None:
    reason, arguments = TORCH[case]
    pair = build_pair("t5-1.1")
    assert reason in str(refusal(pair.fast, **arguments))
    assert_same(pair, **arguments)


@pytest.mark.parametrize("which", ["inputs_embeds", "decoder_inputs_embeds"])
def test_torch_serves_embeddings(which: str) -> None:
    pair = build_pair("t5-1.1")
    ids = "input_ids" if which == "inputs_embeds" else "decoder_input_ids"
    embedded = pair.stock.shared({"input_ids": sources(), "decoder_input_ids": targets()}[ids])
    arguments = {which: embedded.detach(), ids: None}
    assert which in str(refusal(pair.fast, **arguments))
    assert_same(pair, **arguments)


def test_a_4d_encoder_mask_is_served_by_torch() -> None:
    pair = build_pair("t5-1.1")
    mask = torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        found, expected = (
            model.encoder(sources(), attention_mask=mask).last_hidden_state
            for model in (pair.fast, pair.stock)
        )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_ids": None},
        {"decoder_input_ids": None},
        {"inputs_embeds": torch.ones(3, 9, 32)},
        {"input_ids": sources()[0]},
        {"input_ids": sources() + 1000},
        {"input_ids": -sources()},
        {"decoder_input_ids": -targets()},
        {"decoder_input_ids": targets()[:2]},
        {"decoder_input_ids": targets().float()},
        {"attention_mask": ragged()[1:2]},
        {"attention_mask": ragged()[:, :4]},
    ],
)
def test_a_wrong_call_gives_the_error_of_the_stock_model(wrong: dict[str, Any]) -> None:
    pair = build_pair("t5-1.1")
    with pytest.raises(Exception) as expected:
        forward(pair.stock, **wrong)
    with pytest.raises(type(expected.value)):
        forward(pair.fast, **wrong)
    assert_same(pair)


# Outputs


@pytest.mark.parametrize("use_cache", [True, False])
def test_return_dict_false(use_cache: bool) -> None:
    pair = build_pair("t5-1.1")
    expected, found = (
        forward(model, return_dict=False, use_cache=use_cache) for model in (pair.stock, pair.fast)
    )
    assert isinstance(found, tuple)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, **CLOSE)
        else:
            assert isinstance(one, type(other))
    with torch.no_grad():
        assert isinstance(pair.fast.encoder(sources(), return_dict=False), tuple)


def test_outputs_are_not_overwritten_by_later_calls() -> None:
    model = build_pair("t5-1.1").fast
    ids = targets()[:, :1]
    first = forward(model, decoder_input_ids=ids).logits
    kept = first.clone()
    assert not torch.equal(forward(model, decoder_input_ids=ids + 1).logits, kept)
    assert torch.equal(first, kept)


def test_encoder_outputs_may_be_a_tuple_or_any_model_output() -> None:
    pair = build_pair("t5-1.1")
    mask = ragged()
    with torch.no_grad():
        whole = pair.stock.encoder(sources(), attention_mask=mask, output_hidden_states=True)
    forms = [
        whole,
        BaseModelOutput(last_hidden_state=whole[0]),
        (whole[0],),
        (whole[0], whole.hidden_states),
        whole.to_tuple(),
    ]
    for form in forms:
        given = {"input_ids": None, "encoder_outputs": form, "attention_mask": mask}
        assert refusal(pair.fast, **given) is None
        assert_same(pair, **given)


def test_gradients_of_encoder_outputs_are_kept() -> None:
    pair = copy.deepcopy(build_pair("t5-1.1"))
    found = []
    for model in (pair.stock, pair.fast):
        model.requires_grad_(False)
        hidden = model.encoder(sources())[0].detach().requires_grad_()
        call = {"encoder_outputs": (hidden,), "decoder_input_ids": targets()}
        model(**call).logits.square().mean().backward()
        found.append(hidden.grad)
        with torch.no_grad():  # asks for none although the tensor could have one
            assert not model(**call).logits.requires_grad
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


class Foreign:
    """A tensor of another library, such as CuPy; NumPy's arrays the stock classes refuse."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def test_any_dlpack_tensor_is_taken() -> None:
    pair = build_pair("t5-1.1")
    given = {
        "input_ids": Foreign(sources()),
        "attention_mask": Foreign(ragged()),
        "decoder_input_ids": Foreign(targets()),
    }
    found = forward(pair.fast, **given).logits
    assert torch.equal(found, forward(pair.fast, attention_mask=ragged()).logits)
    with torch.no_grad():
        states = pair.fast.encoder(given["input_ids"])[0]
        assert torch.equal(states, pair.fast.encoder(sources())[0])
    generated = pair.fast.generate(
        given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=9
    )
    expected = pair.stock.generate(sources(), attention_mask=ragged(), max_new_tokens=9)
    assert generated.tolist() == expected.tolist()
    assert np.from_dlpack(found).ctypes.data == found.data_ptr()


# Padding


@pytest.mark.parametrize("name", CAUSAL)
def test_a_row_of_only_padding_is_finite_and_leaves_the_others_alone(name: str) -> None:
    pair = build_pair(name)
    mask = ragged()
    mask[2] = 0
    found = forward(pair.fast, attention_mask=mask)
    assert found.logits.isfinite().all()
    expected = forward(pair.stock, attention_mask=ragged()).logits
    torch.testing.assert_close(found.logits[:2], expected[:2], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_padding_holds_does_not_matter(side: str) -> None:
    model = build_pair("t5-1.1").fast
    mask = ragged(side)
    results = [
        forward(model, input_ids=sources() * mask + fill * (1 - mask), attention_mask=mask).logits
        for fill in (0, 45)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-5)


# Contexts


def test_inference_mode() -> None:
    pair = build_pair("t5-1.1")
    with torch.inference_mode():
        assert_same(pair)
        assert refusal(pair.fast) is None
    assert_same(pair)


def test_autocast_computes_what_torch_does() -> None:
    pair = build_pair("t5-1.1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in str(refusal(pair.fast))
        assert torch.equal(forward(pair.fast).logits, forward(pair.stock).logits)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_of_the_torch_model() -> None:
    pair = build_pair("t5-1.1")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = pair.fast

        def forward(self, ids: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, decoder_input_ids=prompt, use_cache=False).logits

    traced = torch.jit.trace(Logits().eval(), (sources(), targets()), check_trace=False)
    other = tokens(3, 9, seed=7)
    expected = forward(pair.stock, input_ids=other).logits
    torch.testing.assert_close(traced(other, targets()), expected, **CLOSE)
