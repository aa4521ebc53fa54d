"""What is checked before a CUDA graph is captured (captures themselves: tests/gpu)."""

from collections.abc import Callable

import pytest
import torch
from transformers.generation.logits_process import EtaLogitsWarper, TopPLogitsWarper

from fastgen.cuda import NotCapturable, RefuseWaits

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
