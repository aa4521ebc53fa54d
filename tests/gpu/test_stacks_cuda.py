"""Hidden states, and a program's own loop over the decoder stack, on a GPU."""

from typing import Any

import pytest
import torch

from fastgen import FastT5Model
from fastgen.hf.contract import CACHE
from tests.gpu.models import DEVICE, DTYPES, error, fast_of, ids, mask, medium_stock

pytestmark = pytest.mark.cuda


@torch.no_grad()
def steps(model: Any, tokens: torch.Tensor, states: bool) -> list[torch.Tensor]:
    """What the decoder stack gives for tokens one by one, [B, Q, E]: all states, or the last."""
    shown = mask(3, 40)
    encoded = model.encoder(ids(3, 40), attention_mask=shown).last_hidden_state
    kept: dict[str, Any] = {}
    found = []
    source = {"encoder_hidden_states": encoded, "encoder_attention_mask": shown}
    for token in tokens.split(1, dim=1):
        output = model.decoder(token, **source, **kept, use_cache=True, output_hidden_states=states)
        kept = {CACHE: output[CACHE]}
        found.append(output.hidden_states if states else (output.last_hidden_state,))
    return [torch.cat(layer, dim=1) for layer in zip(*found, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_an_own_loop_and_its_hidden_states(dtype: torch.dtype) -> None:
    """As close to float64 as stock's, in the same dtypes; beyond the first bucket."""
    stock, tokens = medium_stock(), ids(3, 70, seed=2)
    fast = fast_of(stock, dtype)
    assert fast.decoder.refusal(input_ids=tokens, encoder_hidden_states=...) is None
    narrow = stock.to(DEVICE, dtype)
    exact = medium_stock().double().to(DEVICE)
    for states in (False, True):
        expected, found, right = (steps(m, tokens, states) for m in (narrow, fast, exact))
        assert [s.dtype for s in found] == [s.dtype for s in expected]
        for mine, theirs, truth in zip(found, expected, right, strict=True):
            truth = truth.cpu()
            assert error(mine, truth) <= 1.5 * error(theirs, truth) + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_hidden_states_of_a_forward_call(dtype: torch.dtype) -> None:
    stock = medium_stock()
    fast = fast_of(stock, dtype)
    call = {"input_ids": ids(3, 40), "attention_mask": mask(3, 40)}
    call |= {"decoder_input_ids": ids(3, 9, seed=2), "output_hidden_states": True}
    assert fast.refusal(**call) is None
    narrow = stock.to(DEVICE, dtype)
    exact = medium_stock().double().to(DEVICE)(**call)
    outputs = narrow(**call), fast(**call)
    for side, seen in (("encoder", call["attention_mask"].bool()), ("decoder", ...)):
        name = f"{side}_hidden_states"
        for theirs, mine, truth in zip(*(o[name] for o in (*outputs, exact)), strict=True):
            assert mine.dtype == theirs.dtype
            truth = truth[seen].cpu()
            assert error(mine[seen], truth) <= 1.5 * error(theirs[seen], truth) + 1e-5


@torch.no_grad()
def test_a_model_without_a_head() -> None:
    stock = medium_stock()
    model: Any = FastT5Model(stock.config).eval()
    model.load_state_dict(stock.state_dict(), strict=False)
    model.to(DEVICE)
    call = {"input_ids": ids(2, 30), "decoder_input_ids": ids(2, 7, seed=2)}
    assert model.refusal(**call) is None
    expected = stock.to(DEVICE)(**call, output_hidden_states=True).decoder_hidden_states[-1]
    torch.testing.assert_close(model(**call)[0], expected, rtol=1e-4, atol=1e-4)
