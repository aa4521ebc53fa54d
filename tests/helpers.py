"""What the tests of a model's life share: copies to work on, a forward call, and its path."""

import copy
from typing import Any

import pytest
import torch
from transformers import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5LayerSelfAttention

from tests.configs import TINY, Pair, build_pair

#: Stock logits, of a spread of 10, are up to 1e-4 away from their values in float64.
CLOSE = {"rtol": 1e-4, "atol": 5e-4}

#: One variant of each family whose stock decoder is causal when given several tokens at once. That
#: of UMT5 was not in transformers 5.17, where one token at a time gave other logits.
CAUSAL: tuple[str, ...] = ("t5-1.0", "t5-1.1", "mt5")
if UMT5LayerSelfAttention(UMT5Config(**TINY, is_decoder=True)).SelfAttention.is_causal:
    CAUSAL += ("umt5",)


def copies(name: str = "t5-1.1") -> Pair:
    """Both models of a variant for one test to change; the Fast one has built its engines."""
    pair = copy.deepcopy(build_pair(name))
    logits(pair.fast)
    assert name not in CAUSAL or refusal(pair.fast) is None
    return pair


def tokens(rows: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [rows, length] that stay in the vocabulary when it shrinks to 50."""
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def sources() -> torch.Tensor:
    """Encoder token ids, [3, 9]."""
    return tokens(3, 9, seed=1)


def targets() -> torch.Tensor:
    """Decoder token ids, [3, 5]."""
    return tokens(3, 5, seed=2)


def ragged(side: str = "right") -> torch.Tensor:
    """Attention mask of 9, 5 and 1 source tokens."""
    keep = torch.arange(9) < torch.tensor([[9], [5], [1]])
    return (keep if side == "right" else keep.flip(-1)).long()


@torch.no_grad()
def logits(model: Any, **arguments: Any) -> torch.Tensor:
    """The logits [3, 5, V] of a forward call."""
    call = {"input_ids": sources(), "decoder_input_ids": targets()} | arguments
    return model(**call).logits


@torch.no_grad()
def refusal(model: Any, **arguments: Any) -> str | None:
    """Why a forward call goes to torch; None if it runs on the engine."""
    call = {"input_ids": sources(), "decoder_input_ids": targets()} | arguments
    return model.refusal(**call)


def assert_equal_logits(pair: Pair) -> None:
    """Both models compute the same."""
    torch.testing.assert_close(logits(pair.fast), logits(pair.stock), **CLOSE)


def assert_served(pair: Pair) -> None:
    """The engine computes what the stock model does."""
    assert refusal(pair.fast) is None
    assert_equal_logits(pair)


def assert_left_to_torch(pair: Pair, reason: str) -> None:
    """torch computes what the stock model does, for this reason."""
    found = refusal(pair.fast)
    if found is None:
        pytest.fail("the engine serves a call that it cannot serve exactly")
    assert reason in found
    assert_equal_logits(pair)
