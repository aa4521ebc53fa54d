"""Rotary positions, norms of heads and grouped queries on a GPU: fused steps and prompts, and the
decoder graph, against the stock model in float64."""

import copy
import gc
from typing import Any

import pytest
import torch

from fastgen.hf.contract import CACHE
from tests import rotary
from tests.gpu.models import DEVICE, DTYPES, first_logits

pytestmark = pytest.mark.cuda

BASE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "vocab_size": 501}
BASE |= {"max_position_embeddings": 4096, "num_attention_heads": 8}
HEADS = "num_attention_heads"
#: Family, heads of keys and values, other config fields, rows, and the length of the prompt.
CASES: dict[str, tuple[str, int, dict[str, Any], int, int]] = {
    "one row": ("Llama", 2, {}, 1, 20),
    "one row, normed": ("Qwen3", 4, {}, 1, 20),
    "own keys": ("Llama", 8, {}, 2, 20),
    "one head of keys": ("Qwen3", 1, {}, 3, 20),
    "groups of seven": ("Llama", 2, {HEADS: 14, "hidden_size": 448}, 2, 20),
    "biases": ("Llama", 2, {"attention_bias": True}, 3, 20),
    "four rows": ("Llama", 2, {}, 4, 20),
    "sixteen rows": ("Qwen3", 4, {}, 16, 20),
    "seventeen rows": ("Llama", 2, {}, 17, 20),
    "many rows": ("Qwen3", 2, {}, 70, 20),
    "long": ("Llama", 2, {HEADS: 32}, 1, 1100),
    "long, normed": ("Qwen3", 8, {HEADS: 16, "head_dim": 128}, 1, 1100),
    "long rows": ("Llama", 2, {HEADS: 16}, 16, 600),
    "head size 16": ("Qwen3", 2, {"head_dim": 16}, 2, 20),
    "head size 80": ("Llama", 2, {"head_dim": 80}, 2, 20),
    "head size 96": ("Qwen3", 2, {"head_dim": 96}, 5, 20),
    "head size 128": ("Qwen3", 2, {"head_dim": 128}, 1, 20),
    "head size 128, sixteen rows": ("Llama", 2, {"head_dim": 128}, 16, 20),
    "head size 256": ("Qwen3", 2, {"head_dim": 256}, 1, 20),
    "head size 256, long": ("Llama", 1, {"head_dim": 256, HEADS: 16}, 2, 600),
    "Llama-3.2-1B": (
        "Llama",
        8,
        {"hidden_size": 2048, "intermediate_size": 8192, HEADS: 32},
        1,
        20,
    ),
    "Qwen3-0.6B, 16 rows": (
        *("Qwen3", 8, {"hidden_size": 1024, "head_dim": 128, HEADS: 16}),
        *(16, 20),
    ),
}


def pair(dtype: torch.dtype, family: str, kv_heads: int, **fields: Any) -> tuple[Any, Any]:
    """A stock and a Fast model on the GPU; stock's frequencies stay float32, as where a checkpoint
    is loaded in another dtype."""
    stock, fast = rotary.pair(family, kv_heads, **BASE | fields)
    frequencies = stock.model.rotary_emb.inv_freq.to(DEVICE)
    stock = stock.to(DEVICE, dtype)
    stock.model.rotary_emb.inv_freq = frequencies
    return stock, fast.to(DEVICE, dtype)


def padded(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids of rows padded on the left, each by another number of tokens."""
    starts = torch.arange(rows, device=DEVICE)[:, None] * (length - 4) // max(1, rows - 1)
    mask = (torch.arange(length, device=DEVICE) >= starts).long()
    ids = torch.randint(1, 500, (rows, length), device=DEVICE) * mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits.double() - exact).norm() / exact.norm())


def last_logits(fast: Any, call: dict[str, torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """Of the last token, by two steps behind a prefill of the others; and whether they were
    fused."""
    output, length = None, call["input_ids"].shape[1]
    for end in range(length - 2, length + 1):
        begin = 0 if output is None else end - 1
        given = {name: call[name][:, begin:end] for name in ("input_ids", "position_ids")}
        past = {} if output is None else {CACHE: output[CACHE]}
        mask = call["attention_mask"][:, :end]
        output = fast(**given, **past, attention_mask=mask, use_cache=True, logits_to_keep=1)
    assert output is not None
    return output.logits[:, -1], output[CACHE].bucket.fused


def steps_fused(fast: Any) -> bool:
    gc.collect()  # what holds a bucket, if anything, is a circle
    return [bucket.fused for bucket in fast._engine.pool.idle()][-1:] == [True]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_steps_are_as_exact_as_stocks(case: str, dtype: torch.dtype, fused: bool) -> None:
    family, kv_heads, fields, rows, length = CASES[case]
    stock, fast = pair(dtype, family, kv_heads, **fields)
    fast.engine_options = {"fused_kernels": fused}
    call = padded(rows, length)
    exact = copy.deepcopy(stock).double()(**call).logits[:, -1]
    theirs = error(stock(**call).logits[:, -1], exact)
    found, by_fused = last_logits(fast, call)
    ours = error(found, exact)
    # Which order of sums and roundings is nearer is chance, in tiny models above all
    assert ours <= 1.25 * theirs + 2 * torch.finfo(dtype).eps + 2e-6
    assert by_fused == fused


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", rotary.FAMILIES)
@pytest.mark.parametrize(("rows", "length"), [(1, 9), (1, 33), (3, 90), (2, 400), (9, 500)])
@torch.no_grad()
def test_a_ragged_prompt_leaves_exact_keys_and_values(
    rows: int, length: int, family: str, dtype: torch.dtype
) -> None:
    """By ``generate``, whose loop prefills; the first token's scores tell."""
    stock, fast = pair(dtype, family, 2)
    call = padded(rows, length)
    del call["position_ids"]
    exact, theirs, ours = first_logits(call, copy.deepcopy(stock).double(), stock, fast)
    limit = 1.25 * error(theirs, exact) + 2 * torch.finfo(dtype).eps + 2e-6
    assert error(ours, exact) <= limit
    assert steps_fused(fast)


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 8},
        {"num_beams": 3, "do_sample": True},
        {"min_new_tokens": 80, "max_new_tokens": 82},
        {"num_beams": 4, "min_new_tokens": 80, "max_new_tokens": 82},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", rotary.FAMILIES)
def test_the_tokens_of_the_stock_model(family: str, mode: dict[str, Any]) -> None:
    stock, fast = pair(torch.float32, family, 2)
    for length in (12, 5):
        call, found = padded(3, length), []
        del call["position_ids"]
        for model in (stock, fast):
            torch.manual_seed(0)
            found.append(model.generate(**call, **{"max_new_tokens": 14} | mode))
        assert torch.equal(*found)
    assert steps_fused(fast)
