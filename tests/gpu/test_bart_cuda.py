"""BART on the GPU: post-norm steps on the fused kernels, its encoder on packed tokens."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForQuestionAnswering,
    BartForSequenceClassification,
)

import fastgen
from fastgen.hf.contract import CACHE
from tests.gpu.models import DEVICE, DTYPES

pytestmark = pytest.mark.cuda

SIZES = {
    **{"d_model": 128, "vocab_size": 501, "max_position_embeddings": 256},
    **{"encoder_layers": 2, "decoder_layers": 3, "decoder_start_token_id": 2},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "forced_eos_token_id": None},
}
STOCK = BartForConditionalGeneration, BartForSequenceClassification, BartForQuestionAnswering


def pair(stock_class: Any, dtype: torch.dtype, **fields: Any) -> tuple[Any, Any]:
    """A stock and a Fast model with the same weights, which bfloat16 holds."""
    torch.manual_seed(0)
    config = BartConfig(**SIZES | fields)
    stock = stock_class(config).eval()
    for name, parameter in stock.named_parameters():
        norm = "norm" in name
        scale = 0.3 if norm or parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
        noise = scale * torch.randn_like(parameter) + (norm and "weight" in name)
        parameter.data = noise.bfloat16().float()
    if stock_class is BartForConditionalGeneration:
        stock.final_logits_bias.normal_()
    fast = getattr(fastgen, f"Fast{stock_class.__name__}")(copy.deepcopy(config)).eval()
    fast.load_state_dict(stock.state_dict())
    return stock.to(DEVICE, dtype), fast.to(DEVICE, dtype)


def ragged(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Sources padded on the right."""
    ends = length - torch.arange(rows)[:, None] * (length - 2) // max(1, rows - 1)
    keep = torch.arange(length) < ends
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, 500, (rows, length), generator=generator)
    ids = torch.where(keep, ids, 1)
    return {"input_ids": ids.to(DEVICE), "attention_mask": keep.long().to(DEVICE)}


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 40])
@torch.no_grad()
def test_a_step_is_as_exact_as_stocks(rows: int, dtype: torch.dtype) -> None:
    stock, fast = pair(BartForConditionalGeneration, dtype)
    source, ids = ragged(rows, 24), torch.randint(3, 500, (rows, 7), device=DEVICE)
    exact = copy.deepcopy(stock).double()(**source, decoder_input_ids=ids).logits[:, -1]
    theirs = stock(**source, decoder_input_ids=ids).logits[:, -1]
    past = None
    for token in ids.split(1, dim=1):
        output = fast(**source, decoder_input_ids=token, use_cache=True, **{CACHE: past})
        past = output[CACHE]
    limit = 1.25 * error(theirs, exact) + 2 * torch.finfo(dtype).eps + 2e-6
    assert error(output.logits[:, -1], exact) <= limit
    del past, output
    assert all(bucket.fused for bucket in fast._engine.pool.idle())


@pytest.mark.parametrize("scale_embedding", [False, True])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "do_sample": True},
        {"min_new_tokens": 70, "max_new_tokens": 72},
        {"num_beams": 4, "min_new_tokens": 66, "max_new_tokens": 68},
        {"forced_bos_token_id": 7, "forced_eos_token_id": 2},
    ],
    ids=str,
)
def test_the_tokens_of_the_stock_model(mode: dict[str, Any], scale_embedding: bool) -> None:
    stock, fast = pair(BartForConditionalGeneration, torch.float32, scale_embedding=scale_embedding)
    call = ragged(3, 20) | {"max_new_tokens": 14} | mode
    assert fast.explain(**call).path == "fast loop"
    found = []
    for model in (stock, fast):
        torch.manual_seed(0)
        found.append(model.generate(**call))
    assert torch.equal(*found)
    assert all(bucket.fused for bucket in fast._engine.pool.idle())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stock_class", STOCK[1:])
@torch.no_grad()
def test_heads(stock_class: Any, dtype: torch.dtype) -> None:
    stock, fast = pair(stock_class, dtype)
    call = ragged(5, 30)
    last = call["attention_mask"].sum(1) - 1  # as tokenizers end a text, which the head looks for
    call["input_ids"][torch.arange(5, device=DEVICE), last] = stock.config.eos_token_id
    assert fast.refusal(**call) is None
    exact, theirs, ours = (
        model(**call).to_tuple()[0] for model in (copy.deepcopy(stock).double(), stock, fast)
    )
    limit = 1.25 * error(theirs, exact) + 2 * torch.finfo(dtype).eps + 2e-6
    assert error(ours, exact) <= limit


@torch.no_grad()
def test_the_encoder_computes_no_padding() -> None:
    _, fast = pair(BartForConditionalGeneration, torch.bfloat16)
    encoder = fast.get_encoder()
    encoder(**ragged(3, 20))
    assert encoder._current_engine().fused is not None
