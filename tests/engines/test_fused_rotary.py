"""What the fused kernels record of rotary positions, norms of heads and grouped queries."""

import re
from typing import Any

import pytest
import torch

from fastgen.engines import NotFused
from fastgen.engines.fused.prompt import PromptOps
from fastgen.execution.bucket import Bucket, BucketSize
from tests.engines.test_fused import META, TARGET, an_h100, parameters, record, root_of
from tests.rotary import FAMILIES, TINY

__all__ = ["an_h100"]  # a fixture that all tests here use

#: Family, and sizes as published.
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "Llama-3.2-1B": (
        "Llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
    ),
    "Qwen3-0.6B": (
        "Qwen3",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "heads of 256": (
        "Qwen3",
        {
            "hidden_size": 1152,
            "intermediate_size": 2048,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
        },
    ),
}


def model(family: str, **fields: Any) -> Any:
    """A Fast model without memory."""
    kind, _, fast = FAMILIES[family]
    config = kind(**TINY | {"num_hidden_layers": 3} | fields)
    with META:
        return fast(config).eval().to(torch.bfloat16)


def attention_of(ops: Any) -> str:
    """The instantiation of attention in a recorded source."""
    (found,) = set(re.findall(r"(attention<[^>]*>)", "\n".join(ops._kernels)))
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("size", "each"),
    [
        (BucketSize(1, 1, 128, 0), 5),
        (BucketSize(1, 1, 4096, 0), 5),
        (BucketSize(1, 4, 256, 0), 5),
        (BucketSize(16, 1, 128, 0), 7),  # norms of many rows are launches of their own
    ],
    ids=str,
)
def test_a_step_takes_no_more_launches_than_gpt2s(name: str, size: BucketSize, each: int) -> None:
    """Each layer: query, key and value; attention; three products of the rest."""
    family, fields = SHAPES[name]
    ops = record(model(family, **fields), size)
    ends = 2 if each == 5 else 3  # the embedding and the head, whose norm may be its own
    assert len(ops.launches) == 3 * each + ends
    assert ("NORMED" if family == "Qwen3" else "TURNED") in attention_of(ops)


@pytest.mark.parametrize(
    ("size", "together"),
    [
        (BucketSize(1, 1, 128, 0), 1),  # a processor a head
        (BucketSize(1, 1, 4096, 0), 2),
        (BucketSize(16, 1, 128, 0), 4),
        (BucketSize(64, 1, 128, 0), 4),
    ],
    ids=str,
)
def test_query_heads_share_what_a_block_reads(size: BucketSize, together: int) -> None:
    family, fields = SHAPES["Llama-3.2-1B"]
    ops = record(model(family, **fields), size)
    *_, group, heads, turn = attention_of(ops).removesuffix(">").split(", ")
    assert (group, heads, turn) == ("4", str(together), "TURNED")
    (launch,) = [x for x in ops.launches if "attention" in getattr(x, "kernel", "")][:1]
    blocks = launch.grid[0] // launch.cluster * launch.grid[1]
    assert blocks == 32 // together * size.batch


def test_many_query_tokens_of_a_row_are_turned_by_a_launch_of_their_own() -> None:
    ops = record(model("Qwen3", num_key_value_heads=2), BucketSize(1, 8, 512, 0))
    turned = [x for x in ops.launches if getattr(x, "kernel", "").startswith("turn_rows")]
    assert len(turned) == 3
    assert attention_of(ops).endswith("AS_IS>")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "queries"), [(1, 32), (2, 512), (16, 256)])
def test_prompts_are_turned_before_they_are_stored(family: str, rows: int, queries: int) -> None:
    made = model(family, num_key_value_heads=2)
    root = root_of(made)
    tensors = Bucket(root.shape, TARGET, META, BucketSize(rows, 1, 1024, 0)).tensors
    tensors["input_ids"] = torch.zeros(rows, queries, dtype=torch.int64, device=META)
    tensors["query_positions"] = torch.zeros(queries, 1, dtype=torch.int64, device=META)
    ops = PromptOps(TARGET, parameters(made), tensors, filled=0)
    root.decode(ops, **{n: t for n, t in tensors.items() if n not in ("logits", "kept")})
    ops.trim()
    assert [getattr(x, "kernel", "?").split("_")[0] for x in ops.launches].count("turn") == 3
    assert len(tensors["self_key.0"].shape) == 3
    assert tensors["self_key.0"].shape[2] == 2 * 16


def test_refusals() -> None:
    with pytest.raises(NotFused, match="head size 24"):
        record(model("Llama", head_dim=24, num_key_value_heads=4), BucketSize(1, 1, 64, 0))
