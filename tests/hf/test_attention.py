"""``set_attn_implementation``: what transformers reads the source of a class's module for."""

from typing import Any

import pytest
import torch

from tests.configs import fast_class, stock_class
from tests.helpers import CAUSAL, CLOSE, assert_served, copies, sources, targets

VARIANTS = ["t5-1.1", "mt5", "umt5"]


@pytest.mark.parametrize("name", VARIANTS)
def test_fast_classes_may_set_what_stock_classes_may(name: str) -> None:
    pair = copies(name)
    kinds = [(fast_class(name), stock_class(name))]
    kinds.append((type(pair.fast.encoder), type(pair.stock.encoder)))
    for fast, stock in kinds:
        assert fast._can_set_attn_implementation() == stock._can_set_attn_implementation()


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_implementation_set_is_that_of_the_stock_model(name: str, kind: str) -> None:
    pair = copies(name)
    outputs: list[Any] = []
    for model in (pair.fast, pair.stock):
        model.set_attn_implementation(kind)
        call = {"input_ids": sources(), "decoder_input_ids": targets(), "output_attentions": True}
        with torch.no_grad():
            outputs.append(model(**call))
    parts = ["", "encoder", "decoder"]
    found, expected = (
        [m.get_submodule(part).config._attn_implementation for part in parts]
        for m in (pair.fast, pair.stock)
    )
    assert found == expected
    for field in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        torch.testing.assert_close(outputs[0][field], outputs[1][field], **CLOSE)
    assert_served(pair)
