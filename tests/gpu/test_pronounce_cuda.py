"""Trained weights on a GPU: fp16 and bf16 pronounce held-out words as stock fp32 does.

Where a word differs, the two best tokens of stock fp32 must be nearly tied: their margin there is
below what rounding to the dtype does to such margins in the stock class itself.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from examples.pronounce.data import held_out_words
from examples.pronounce.inference import CHECKPOINT, generate_tokens, load, tokenizer

pytestmark = pytest.mark.cuda

DTYPES = [torch.float16, torch.bfloat16]
SAME = 0.995  # share of words
START, END = 0, 1  # token ids


@dataclass(frozen=True)
class Reference:
    """What stock fp32 says: [words, positions] unless noted."""

    words: list[str]
    tokens: list[list[int]]  # of each word, the end token last
    prefixes: Tensor  # decoder_input_ids that lead to these tokens
    valid: Tensor  # True at tokens, False at padding
    logits: Tensor  # [words, positions, vocabulary]
    best: Tensor  # ids of the two best tokens, [words, positions, 2]
    margin: Tensor  # logit of the best token minus that of the second


def spoken(model: PreTrainedModel, words: list[str], batch_size: int) -> list[list[int]]:
    """Greedy tokens of each word, the end token last."""
    return [[*row, END] for row in generate_tokens(model, words, batch_size=batch_size)]


@torch.inference_mode()
def forced_logits(model: PreTrainedModel, words: list[str], prefixes: Tensor) -> Tensor:
    """fp32 logits [words, positions, vocabulary] of the model fed with given tokens."""
    inputs = tokenizer()(words, padding=True, return_tensors="pt").to(model.device)
    return model(**inputs, decoder_input_ids=prefixes).logits.float()


def margins(logits: Tensor, best: Tensor) -> Tensor:
    """Logit of the first token of `best` minus that of the second."""
    first, second = logits.gather(-1, best).unbind(-1)
    return first - second


@pytest.fixture(scope="module")
def reference() -> Reference:
    words, stock = held_out_words(), load(CHECKPOINT, fast=False, device="cuda")
    tokens = spoken(stock, words, batch_size=256)
    length = max(map(len, tokens))
    padded = torch.tensor([row + [-1] * (length - len(row)) for row in tokens], device="cuda")
    valid = padded >= 0
    prefixes = torch.nn.functional.pad(padded[:, :-1].clamp(min=START), (1, 0), value=START)
    logits = forced_logits(stock, words, prefixes)
    best = logits.topk(2).indices
    assert torch.equal(best[..., 0][valid], padded[valid])  # these are the tokens it generated
    return Reference(words, tokens, prefixes, valid, logits, best, margins(logits, best))


def errors(reference: Reference, dtype: torch.dtype, *, fast: bool) -> tuple[Tensor, Tensor]:
    """How far a class in a dtype is from the reference: (margins, logits), tokens only."""
    model = load(CHECKPOINT, fast=fast, device="cuda", dtype=dtype)
    logits = forced_logits(model, reference.words, reference.prefixes)
    margin = margins(logits, reference.best) - reference.margin
    return margin[reference.valid], (logits - reference.logits)[reference.valid]


@pytest.mark.parametrize("batch_size", [1, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_words_differ_only_at_near_ties(
    reference: Reference, dtype: torch.dtype, batch_size: int
) -> None:
    fast = load(CHECKPOINT, fast=True, device="cuda", dtype=dtype)
    sample = tokenizer()("word", return_tensors="pt").to("cuda")
    assert fast.explain(**sample).path == "fast loop"
    found = spoken(fast, reference.words, batch_size)
    bound = errors(reference, dtype, fast=False)[0].abs().max().item()
    differing = {}
    for index, (expected, row) in enumerate(zip(reference.tokens, found, strict=True)):
        if row != expected:
            # neither is the beginning of the other: the end token is in both, and last
            pairs = enumerate(zip(expected, row, strict=False))
            at = next(i for i, (token, other) in pairs if token != other)
            differing[reference.words[index]] = reference.margin[index, at].item()
    total = len(reference.words)
    print(f"{total - len(differing)} of {total} words alike, bound {bound:.4f}: {differing}")
    assert len(differing) <= (1 - SAME) * total
    assert {word: margin for word, margin in differing.items() if margin > bound} == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_no_farther_from_fp32_than_stock(
    reference: Reference, dtype: torch.dtype
) -> None:
    stock, fast = (errors(reference, dtype, fast=fast)[1].square().mean() for fast in (False, True))
    print(f"root mean square error of logits: stock {stock.sqrt():.5f}, fast {fast.sqrt():.5f}")
    assert fast <= 1.1 * stock  # other kernels round elsewhere, not more
