"""The encoder's and cross graph's captured graphs on a GPU: the hidden states, streams, weights."""

from typing import Any

import pytest
import torch

from fastgen.execution.capturing import CAPTURED_TOKENS
from fastgen.execution.encoder import Encoder
from tests.gpu.models import DEVICE, DTYPES, error, fast_of, ids, mask, medium_stock, reference

pytestmark = pytest.mark.cuda

SIZES = [(3, 40), (1, 7), (3, 33), (2, 64), (1, 1), (3, 40)]


def replays(model: Any) -> list[tuple[int, ...]]:
    """Rows and tokens of each that graphs were captured for."""
    encoder: Encoder = model.encoder._current_engine()
    of_fused = encoder.fused is not None  # whose sizes begin with the tokens of all rows
    return [size[1:3] if of_fused else size for size in encoder._replays]


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_hidden_states_are_as_close_as_those_of_launched_kernels(dtype: torch.dtype) -> None:
    stock = medium_stock()
    captured, launched = fast_of(stock, dtype), fast_of(stock, dtype, {"cuda_graphs": False})
    exact = stock.double().to(DEVICE)
    for rows, sources in SIZES:
        call = {
            "input_ids": ids(rows, sources, seed=sources),
            "attention_mask": mask(rows, sources),
        }
        expected = exact.encoder(**call).last_hidden_state
        seen = call["attention_mask"].bool()
        errors = [
            (model.encoder(**call).last_hidden_state.double() - expected)[seen].square().mean()
            for model in (captured, launched)
        ]
        assert errors[0].sqrt() <= 1.2 * errors[1].sqrt() + 1e-6
    assert replays(captured) == [(2, 64), (1, 32), (3, 64)]  # the last used is last
    assert replays(launched) == []


@torch.no_grad()
def test_many_source_tokens_are_not_captured() -> None:
    model = fast_of(medium_stock(), torch.bfloat16)
    rows = CAPTURED_TOKENS // 32
    model.encoder(input_ids=ids(rows + 1, 32))
    assert replays(model) == []
    model.encoder(input_ids=ids(rows, 32))
    assert replays(model) == [(rows, 32)]


@torch.no_grad()
def test_an_edited_weight_is_seen_by_a_captured_graph() -> None:
    stock = medium_stock()
    model = fast_of(stock, torch.float32)
    call = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 3)}
    stock = stock.to(DEVICE)
    for _ in range(2):
        found, expected = model(**call).logits, stock(**call).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        for each in (model, stock):
            each.encoder.block[1].layer[0].SelfAttention.o.weight.mul_(3)
            each.decoder.block[1].layer[1].EncDecAttention.k.weight.mul_(2)


@torch.no_grad()
def test_streams_do_not_overtake_each_other() -> None:
    model = fast_of(medium_stock(), torch.float32)
    calls = [ids(2, 30, seed=seed) for seed in range(8)]
    expected = [model.encoder(input_ids=call).last_hidden_state for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found = []
    for call, stream in zip(calls, streams, strict=True):
        with torch.cuda.stream(stream):
            found.append(model.encoder(input_ids=call).last_hidden_state)
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_errors_of_logits_stay_those_of_the_stock_model() -> None:
    """In bfloat16, with padding both of the caller's and of a captured graph's."""
    stock = medium_stock()
    call = {
        "input_ids": ids(3, 21),
        "attention_mask": mask(3, 21),
        "decoder_input_ids": ids(3, 6),
    }
    model = fast_of(stock, torch.bfloat16)
    exact = reference(stock, call)
    same = stock.to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        assert error(model(**call).logits, exact) <= 1.2 * error(same(**call).logits, exact)
