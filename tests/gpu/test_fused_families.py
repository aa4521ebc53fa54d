"""GPT-2 on the fused kernels: steps and prompts, against the stock model in float64."""

import copy
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastgen import FastGPT2LMHeadModel
from fastgen.hf.contract import CACHE
from tests.gpu.models import DEVICE, DTYPES, first_logits

pytestmark = pytest.mark.cuda

BASE = {"n_embd": 128, "n_head": 2, "n_layer": 2, "n_positions": 1024, "vocab_size": 501}
#: Config fields, and rows.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "one row": ({}, 1),
    "four rows": ({}, 4),
    "five rows": ({}, 5),
    "sixteen rows": ({}, 16),
    "seventeen rows": ({}, 17),
    "many rows": ({}, 70),
    "head size 16": ({"n_embd": 64, "n_head": 4}, 1),
    "head size 48": ({"n_embd": 96, "activation_function": "relu"}, 2),
    "head size 80": ({"n_embd": 160}, 1),
    "head size 96": ({"n_embd": 192, "activation_function": "gelu"}, 3),
    "head size 256": ({"n_embd": 512}, 3),
    "wide": ({"n_embd": 1600, "n_head": 25}, 1),
    "wide, four rows": ({"n_embd": 768, "n_head": 12}, 4),
    "wide, sixteen rows": ({"n_embd": 1600, "n_head": 25}, 16),
    "four columns a thread": ({"n_embd": 4096, "n_head": 32, "n_layer": 1}, 1),
    "scaled by layer": ({"scale_attn_by_inverse_layer_idx": True}, 1),
    "odd feed-forward": ({"n_inner": 264}, 1),
}


def pair(dtype: torch.dtype, **fields: Any) -> tuple[Any, Any]:
    """A stock and a Fast model with the same weights, which bfloat16 holds."""
    torch.manual_seed(0)
    config = GPT2Config(**BASE | {"bos_token_id": 0, "eos_token_id": 0} | fields)
    stock = GPT2LMHeadModel(config).eval()
    for name, parameter in stock.named_parameters():
        scale = 0.5 if parameter.ndim == 1 or "wte" in name else 2 * parameter.shape[0] ** -0.5
        noise = scale * torch.randn_like(parameter) + ("ln_" in name and "weight" in name)
        parameter.data = noise.bfloat16().float()
    fast = FastGPT2LMHeadModel(copy.deepcopy(config)).eval()
    fast.load_state_dict(stock.state_dict())
    return stock.to(DEVICE, dtype), fast.to(DEVICE, dtype)


def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits.double() - exact).norm() / exact.norm())


def errors_of_a_step(stock: Any, fast: Any, call: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Of stock's logits and of ours at the last of these tokens; ours by a step behind the rest."""
    exact = copy.deepcopy(stock).double()(**call).logits[:, -1]
    plain = stock(**call).logits[:, -1]
    first = {name: value[:, :-1] for name, value in call.items() if name != "attention_mask"}
    last = {name: value[:, -1:] for name, value in call.items() if name != "attention_mask"}
    masks = {}
    if "attention_mask" in call:
        masks = {"attention_mask": call["attention_mask"]}
        first["attention_mask"] = call["attention_mask"][:, :-1]
    past = fast(**first, use_cache=True, logits_to_keep=1)[CACHE]
    ours = fast(**last, **masks, **{CACHE: past}, use_cache=True).logits[:, -1]
    return error(plain, exact), error(ours, exact)


def steps_fused(fast: Any) -> bool:
    decoder = fast._engine
    return all(bucket.fused for bucket in decoder.pool.idle())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_step_is_as_exact_as_stocks(case: str, dtype: torch.dtype) -> None:
    fields, rows = CASES[case]
    stock, fast = pair(dtype, **fields)
    ids = torch.randint(1, 500, (rows, 20), device=DEVICE)
    theirs, ours = errors_of_a_step(stock, fast, {"input_ids": ids})
    # Which order of sums and roundings is nearer is chance, in tiny models above all
    assert ours <= 1.25 * theirs + 2 * torch.finfo(dtype).eps + 2e-6
    assert steps_fused(fast)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "length"), [(1, 33), (3, 90), (2, 400), (9, 500)])
@torch.no_grad()
def test_a_ragged_prompt_leaves_exact_keys_and_values(
    rows: int, length: int, dtype: torch.dtype
) -> None:
    """By ``generate``, whose loop prefills; the first token's scores tell."""
    stock, fast = pair(dtype)
    starts = torch.arange(rows, device=DEVICE)[:, None] * (length - 2) // max(1, rows - 1)
    keep = torch.arange(length, device=DEVICE) >= starts
    call = {"input_ids": torch.randint(1, 500, (rows, length), device=DEVICE) * keep}
    call["attention_mask"] = keep.long()
    exact, theirs, ours = first_logits(call, copy.deepcopy(stock).double(), stock, fast)
    limit = 1.25 * error(theirs, exact) + 2 * torch.finfo(dtype).eps + 2e-6
    assert error(ours, exact) <= limit
    assert steps_fused(fast)


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "do_sample": True},
        {"min_new_tokens": 80, "max_new_tokens": 82},
        {"num_beams": 4, "min_new_tokens": 80, "max_new_tokens": 82},
        {"num_beams": 4, "output_scores": True, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_the_tokens_of_the_stock_model(mode: dict[str, Any]) -> None:
    stock, fast = pair(torch.float32)
    for length in (12, 5, 1):
        keep = torch.arange(length) >= torch.tensor([[0], [length // 2], [length - 1]])
        ids = torch.randint(1, 500, (3, length), generator=torch.Generator().manual_seed(length))
        call = {"input_ids": (ids * keep).to(DEVICE), "attention_mask": keep.long().to(DEVICE)}
        found = []
        for model in (stock, fast):
            torch.manual_seed(0)
            output = model.generate(**call, **{"max_new_tokens": 14, "pad_token_id": 0} | mode)
            found.append(output if torch.is_tensor(output) else output.sequences)
        assert torch.equal(*found)
    assert steps_fused(fast)
