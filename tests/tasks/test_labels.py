"""``labels`` under ``no_grad`` (scoring candidates) are served, with the stock model's loss."""

from typing import Any

import pytest
import torch

from tests.configs import VARIANTS, build_pair
from tests.helpers import CAUSAL, CLOSE, copies, refusal, sources, targets

#: UMT5's stock decoder of transformers 5.17 sees the tokens to come.
NAMES = [name for name in VARIANTS if name in CAUSAL or not name.startswith("umt5")]

IGNORED = torch.where(targets() % 3 == 0, -100, targets())
CASES: dict[str, dict[str, Any]] = {
    "labels": {"labels": targets()},
    "ignored tokens": {"labels": IGNORED},
    "all ignored": {"labels": torch.full((3, 5), -100)},
    "one token": {"labels": targets()[:, :1]},
    "mask": {"labels": targets(), "attention_mask": (sources() > 10).long()},
    "decoder ids": {"labels": IGNORED, "decoder_input_ids": targets()},
    "no KV cache": {"labels": targets(), "use_cache": False},
    "Trainer": {"labels": targets(), "num_items_in_batch": torch.tensor(15)},
}


@torch.no_grad()
def forward(model: Any, **call: Any) -> Any:
    return model(input_ids=sources(), **call)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_stock_models(name: str) -> None:
    pair = build_pair(name)
    for case, call in CASES.items():
        assert refusal(pair.fast, **{"decoder_input_ids": None, **call}) is None
        expected, found = forward(pair.stock, **call), forward(pair.fast, **call)
        assert found.keys() == expected.keys(), case
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        assert found.loss.dtype == expected.loss.dtype


def test_given_encoder_outputs_and_a_tuple() -> None:
    pair = build_pair("t5-1.1")
    found = []
    for model in (pair.stock, pair.fast):
        with torch.no_grad():
            states = model.encoder(sources())
            call = {"encoder_outputs": states, "labels": IGNORED, "return_dict": False}
            assert model is pair.stock or model.refusal(**call) is None
            found.append(model(**call))
    assert len(found[0]) == len(found[1])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)


def test_candidates_rank_as_in_the_stock_model() -> None:
    pair = build_pair("t5-1.0")
    candidates = [targets() + shift for shift in range(12)]
    orders = [
        sorted(range(12), key=lambda i, m=model: forward(m, labels=candidates[i]).loss.item())
        for model in (pair.stock, pair.fast)
    ]
    assert orders[0] == orders[1]


def test_gradients_of_the_loss_are_torchs() -> None:
    pair = copies()
    for model in (pair.stock, pair.fast):
        model(input_ids=sources(), labels=targets()).loss.backward()
    weights = [model.lm_head.weight.grad for model in (pair.stock, pair.fast)]
    torch.testing.assert_close(weights[1], weights[0])
