"""Decoder-only models with rotary positions, grouped queries and norms of heads, against stock
ones: whatever the vocabulary, KV buffers and decoding loops have to know of them."""

from typing import Any

import pytest
import torch

from fastgen.hf.contract import CACHE
from tests.rotary import FAMILIES, pair

MODELS = [(family, kv_heads) for family in FAMILIES for kv_heads in (4, 2, 1)]
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


def ragged(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows padded on the left, row i by 3 * i tokens."""
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = (torch.arange(length) >= 3 * torch.arange(rows)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize(("family", "kv_heads"), MODELS)
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_prefill_and_steps_give_the_stock_logits(family: str, kv_heads: int, rows: int) -> None:
    stock, fast = pair(family, kv_heads)
    call, prompt = ragged(rows, 14), 9
    mask = call["attention_mask"]
    call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = stock(**call).logits
    kwargs: dict[str, Any] = {"use_cache": True}
    first = {name: value[:, :prompt] for name, value in call.items()}
    assert fast.refusal(**first) is None
    output = fast(**first, **kwargs)
    found = [output.logits]
    for i in range(prompt, 14):
        kwargs |= {CACHE: output[CACHE], "attention_mask": mask[:, : i + 1]}
        last = {name: call[name][:, i : i + 1] for name in ("input_ids", "position_ids")}
        assert fast.refusal(**last, **kwargs) is None
        output = fast(**last, **kwargs)
        found.append(output.logits)
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[seen], expected[seen], **CLOSE)
    keys = output[CACHE].layers[0].keys
    assert keys.shape == (rows, kv_heads, 14, 16)


@pytest.mark.parametrize(("family", "kv_heads"), MODELS)
@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_generate_gives_the_stock_tokens(family: str, kv_heads: int, mode: dict[str, Any]) -> None:
    stock, fast = pair(family, kv_heads)
    call = ragged(1 if "prompt_lookup_num_tokens" in mode else 3, 11)
    found = []
    for model in (stock, fast):
        torch.manual_seed(0)
        found.append(model.generate(**call, max_new_tokens=40, **mode))
    assert torch.equal(*found)
    assert fast._engine is not None


@torch.no_grad()
def test_frequencies_and_their_scale_are_the_configs() -> None:
    """YaRN's: other frequencies, and cosines that are no longer at most 1."""
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    }
    stock, fast = pair("Llama", 2, rope_parameters=scaling)
    assert fast._decoder_root().turns > 1
    call = ragged(1, 60)
    torch.testing.assert_close(fast(**call).logits, stock(**call).logits, **CLOSE)
