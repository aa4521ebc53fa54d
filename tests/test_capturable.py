"""What is checked before a CUDA graph is captured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import EtaLogitsWarper, TopPLogitsWarper

from fastgen.capturable import NotCapturable, RefuseDraws, RefuseWaits

IDS, SCORES = torch.zeros(2, 3, dtype=torch.int64), torch.randn(2, 50)


@pytest.mark.parametrize(
    "wait",
    [
        lambda: SCORES.sum().item(),
        lambda: bool((SCORES > 0).all()),
        lambda: SCORES.argmax().nonzero(),
        lambda: IDS.unique(),
        lambda: EtaLogitsWarper(0.1)(IDS, SCORES),  # its distribution validates its arguments
    ],
)
def test_code_that_asks_for_a_value_is_found(wait: Callable[[], object]) -> None:
    with pytest.raises(NotCapturable), RefuseWaits():
        wait()


def test_code_that_does_not_gives_what_it_gives() -> None:
    expected = TopPLogitsWarper(0.5)(IDS, SCORES)
    with RefuseWaits():
        found = TopPLogitsWarper(0.5)(IDS, SCORES)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("refuse", [RefuseDraws, RefuseWaits])
@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.multinomial(SCORES.softmax(-1), 1),
        lambda: torch.rand(3),
        lambda: torch.nn.functional.dropout(SCORES, 0.5),
        lambda: SCORES.clone().exponential_(),
    ],
)
def test_code_that_draws_is_found_before_it_does(draw: Any, refuse: Any) -> None:
    state = torch.get_rng_state()
    with pytest.raises(NotCapturable, match="draws"), refuse():
        draw()
    assert torch.equal(torch.get_rng_state(), state)
