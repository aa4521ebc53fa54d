"""Models without an encoder on the GPU: tokens and logits against the stock model."""

import copy
from typing import Any

import pytest
import torch

from tests.configs import DECODERS, prompts
from tests.gpu.models import DEVICE, DTYPES, cuda_copies, cuda_pair

pytestmark = pytest.mark.cuda

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 4},
    "beam sample": {"num_beams": 3, "do_sample": True},
    "longer than a bucket": {"min_new_tokens": 70, "max_new_tokens": 72},
    "beams longer than a bucket": {"num_beams": 2, "min_new_tokens": 66, "max_new_tokens": 68},
}


def batch(padded: bool, length: int = 12) -> dict[str, torch.Tensor]:
    """Three prompts; if ``padded``, two of them shorter, on the left."""
    keep = torch.arange(length) >= torch.tensor([[0], [5], [length - 1]]) * padded
    ids = prompts("gpt2", 3, length) * keep
    return {"input_ids": ids.to(DEVICE), "attention_mask": keep.long().to(DEVICE)}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DECODERS)
def test_the_tokens_of_the_stock_model(name: str, mode: str, padded: bool) -> None:
    pair, found = cuda_pair(name), []
    call = batch(padded) | {"max_new_tokens": 14} | MODES[mode]
    assert pair.fast.explain(**call).path == "fast loop"  # type: ignore[operator]
    for model in (pair.stock, pair.fast):
        torch.manual_seed(0)
        found.append(model.generate(**call).tolist())  # type: ignore[operator]
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_captured_steps_serve_prompts_of_every_length(mode: str) -> None:
    pair = cuda_pair("gpt2")
    for length in (12, 5, 1, 30):
        call = batch(False, length) | {"max_new_tokens": 14} | MODES[mode]
        expected, found = (m.generate(**call) for m in (pair.stock, pair.fast))  # type: ignore[operator]
        assert torch.equal(expected, found)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_logits_are_as_near_to_exact_as_stocks(dtype: torch.dtype) -> None:
    pair = cuda_copies("gpt2", dtype)
    ids = batch(False)["input_ids"]
    exact = copy.deepcopy(pair.stock).double()(input_ids=ids).logits
    assert pair.fast.refusal(input_ids=ids) is None  # type: ignore[operator]
    errors = [(m(input_ids=ids).logits.double() - exact).abs().max() for m in vars(pair).values()]
    assert errors[1] <= 2 * errors[0] + 1e-4
