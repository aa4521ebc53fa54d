"""GPT-2 without a language model head on a GPU: all tokens at once, against stock."""

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import GPT2Config

import fastgen
from tests.gpu.models import DEVICE, DTYPES, ids, mask

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_errors_are_no_larger_than_stocks(dtype: torch.dtype, head: str) -> None:
    config = GPT2Config(vocab_size=96, n_embd=256, n_head=4, n_layer=3, pad_token_id=0)
    torch.manual_seed(0)
    stock: Any = getattr(transformers, f"GPT2{head}")(config).eval().to(DEVICE, dtype)
    fast = getattr(fastgen, f"FastGPT2{head}")(copy.deepcopy(config)).eval().to(DEVICE, dtype)
    fast.load_state_dict(stock.state_dict())
    exact = copy.deepcopy(stock).double()
    for rows, length in ((1, 7), (3, 40), (40, 60)):
        seen = mask(rows, length)
        call = {"input_ids": ids(rows, length) * seen, "attention_mask": seen}
        assert fast.refusal(**call) is None
        expected = exact(**call)[0]
        where = seen.bool() if expected.ndim == 3 else slice(None)
        own, stocks = (
            float((model(**call)[0].double() - expected)[where].norm()) for model in (fast, stock)
        )
        # of a few numbers, which roundings are nearer is chance
        chance = 2 * torch.finfo(dtype).eps * float(expected[where].norm())
        assert own <= 1.2 * stocks + chance, (rows, own, stocks)
