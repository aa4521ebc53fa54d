"""What is checked before a CUDA graph is captured."""

from collections.abc import Callable
from contextlib import nullcontext
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


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_draws_for_its_dropout_only(dropout: float) -> None:
    """Of kernels that the CPU does not have: by their shapes."""
    q, starts = (
        torch.empty(9, 2, 8, device="meta"),
        torch.zeros(3, dtype=torch.int32, device="meta"),
    )
    flash, efficient = (
        getattr(torch.ops.aten, f"_{name}_attention_forward") for name in ("flash", "efficient")
    )
    each = torch.empty(2, 2, 9, 8, device="meta")
    whole = torch.ops.aten._scaled_dot_product_flash_attention
    for attend in (
        lambda: whole(each, each, each, dropout),
        lambda: whole(each, each, each, dropout_p=dropout),
        lambda: flash(q, q, q, starts, starts, 5, 5, dropout, False, False),
        lambda: efficient(*[q[None]] * 3, None, starts, starts, 5, 5, dropout, 0),
    ):
        refused = pytest.raises(NotCapturable, match="draws") if dropout else nullcontext()
        with refused, RefuseWaits():
            attend()


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
