"""The vocabulary in plain torch computes, in float32, what the stock models do: every family."""

from typing import Any

import pytest
import torch

from fastgen import registry
from fastgen.precision import find_unstable, passes
from fastgen.target import onnxruntime_cuda
from tests import rotary
from tests.configs import EVERY, TINY, TINY_BART, TINY_DECODER, build_pair
from tests.models.test_bert import TINY as TINY_BERT
from tests.models.test_bert import build

CLOSE = {"rtol": 1e-4, "atol": 5e-4}


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "onnxruntime_cuda", lambda dtype: onnxruntime_cuda("float32"))


def ragged(left: bool = False) -> dict[str, torch.Tensor]:
    """Token ids [3, 9] and their mask."""
    keep = torch.arange(9) < torch.tensor([[9], [5], [1]])
    mask = (keep.flip(1) if left else keep).long()
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_logits(name: str, in_float32: None) -> None:
    pair = build_pair(name)
    batch = ragged(left=not pair.stock.config.is_encoder_decoder)
    if pair.stock.config.is_encoder_decoder:
        # stock UMT5 of transformers 5.17 is not causal within a prompt
        batch["decoder_input_ids"] = batch["input_ids"].flip(0)[:, : 1 if name == "umt5" else 9]
    (found,) = passes.Passes(pair.fast, [batch]).run(None)
    expected = pair.stock(**batch).logits
    seen = torch.ones_like(expected[..., 0], dtype=torch.bool)
    if not pair.stock.config.is_encoder_decoder:  # what padding computes, nothing reads
        seen = batch["attention_mask"].bool()
        positions = (seen.long().cumsum(1) - 1).clamp(min=0)
        expected = pair.stock(**batch, position_ids=positions).logits
    torch.testing.assert_close(found["logits"].tensor[seen], expected[seen], **CLOSE)


@pytest.mark.parametrize("variant", ["tiny", "relu", "tanh"])
@torch.no_grad()
def test_hidden_states_of_bert(variant: str, in_float32: None) -> None:
    pair, batch = build("Model", variant), ragged()
    batch["token_type_ids"] = batch["input_ids"] % 2
    (found,) = passes.Passes(pair.fast, [batch]).run(None)
    seen = batch["attention_mask"].bool()
    expected = pair.stock(**batch).last_hidden_state
    torch.testing.assert_close(found[passes.ENCODED].tensor[seen], expected[seen], **CLOSE)


@pytest.mark.parametrize(
    ("family", "kv_heads"), [("Llama", 4), ("Llama", 2), ("Qwen3", 1), ("Qwen3", 2)]
)
@torch.no_grad()
def test_rotary_positions_grouped_queries_and_norms_of_heads(
    family: str, kv_heads: int, in_float32: None
) -> None:
    stock, fast = rotary.pair(family, kv_heads)
    batch = ragged() | {"attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    (found,) = passes.Passes(fast, [batch]).run(None)
    torch.testing.assert_close(found["logits"].tensor, stock(**batch).logits, **CLOSE)


SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("t5", "mt5", "umt5"), TINY),
    **{"gpt2": TINY_DECODER, "bert": TINY_BERT, "bart": TINY_BART},
}


@pytest.mark.parametrize(
    ("model_type", "task"),
    [(kind, task) for kind, family in registry.FAMILIES.items() for task in family.tasks],
)
def test_every_class_can_be_looked_at(model_type: str, task: str) -> None:
    """A whole model, a stack alone, or stacks under a stock head: nothing of it overflows."""
    import fastgen

    fast = getattr(fastgen, registry.FAMILIES[model_type].class_name(task))
    model = fast(fast.config_class(**SIZES[model_type])).eval()
    model.engine_options = {"disk_cache": False}
    precision = find_unstable(model)
    assert precision.operations > 15 and precision.wide == ()
