"""The decoder's buffers serve calls of every kind; further tokens are looked at as first ones."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fastgen.hf.contract import CACHE
from tests.configs import build_pair
from tests.generation.emulate import gpu_paths
from tests.helpers import assert_equal_logits, copies, sources, targets


@torch.no_grad()
def forward(model: Any, **arguments: Any) -> Any:
    return model(**arguments)


@pytest.mark.parametrize(
    "wrong", [torch.tensor([[5]]), torch.tensor([[5], [-1], [7]]), torch.ones(3, 1)]
)
def test_wrong_ids_of_a_further_token_are_errors(wrong: torch.Tensor) -> None:
    pair = build_pair("t5-1.1")
    for model in (pair.stock, pair.fast):
        first = {"input_ids": sources()[:3], "decoder_input_ids": targets()[:3, :2]}
        output = forward(model, **first, use_cache=True)
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            forward(
                model,
                encoder_outputs=(output.encoder_last_hidden_state,),
                decoder_input_ids=wrong,
                **{CACHE: output[CACHE]},
            )


def test_a_mask_of_fractions_hides_nothing() -> None:
    pair = build_pair("t5-1.1")
    mask = torch.full(sources().shape, 0.5)
    mask[0, 4:] = 0
    call: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8}
    expected = pair.stock.generate(sources(), **call)
    assert torch.equal(pair.fast.generate(sources(), **call), expected)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_buffers_made_in_inference_mode_serve_every_mode(beams: int, on_gpu: bool) -> None:
    pair = copies("t5-1.1")
    pair.fast.invalidate_engine()
    call: dict[str, Any] = {"max_new_tokens": 5, "num_beams": beams}
    expected = pair.stock.generate(sources(), **call)
    with gpu_paths() if on_gpu else nullcontext():
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(pair.fast.generate(sources(), **call), expected)
                assert_equal_logits(pair)
