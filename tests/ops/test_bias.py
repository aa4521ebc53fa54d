"""What is added to attention's scores, against torch (see ``test_standard.py``)."""

from typing import Any

import pytest
import torch

from fastgen.ops.standard import Ops
from fastgen.ops.values import Bias
from fastgen.target import Target
from tests.ops.test_standard import CPU, CUDA, STANDARD, build, check, names, random, run


def test_mask_bias_hides_what_is_masked_and_stays_finite() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    expected = torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min / 2)[:, None, None]
    check(lambda op, w, mask: op.mask_bias(mask), {"mask": mask}, expected)


def test_position_table_and_bias() -> None:
    """Distances key - query from -3 to 3, clipped there; distance 1 hidden on request."""
    buckets = [0, 1, 2, 3, 5, 4, 2]  # distances 0, 1, 2, 3, then -3, -2, -1
    weight = random(6, 2)  # [buckets, heads]
    queries, keys = torch.arange(3, 6)[:, None], torch.arange(9)[None]
    distance = (keys - queries).clamp(-3, 3)
    expected = weight[torch.tensor(buckets)[distance]].permute(2, 0, 1)[None].contiguous()

    def call(op: Ops, w: Any, queries: Any, keys: Any) -> Any:
        table = op.position_table(w.weight, buckets, None)
        return op.position_bias(table, queries, keys, -3, 3)

    inputs = {"queries": queries, "keys": keys}
    check(call, inputs, expected, weight=weight)

    def causal(op: Ops, w: Any, queries: Any, keys: Any) -> Any:
        table = op.position_table(w.weight, buckets, future=1)
        return op.position_bias(table, queries, keys, -3, 1)

    hidden = expected.masked_fill(keys > queries, float("-inf"))
    check(causal, inputs, hidden, weight=weight)


def spelled_out(parts: str, width: int) -> torch.Tensor:
    """What the parts of ``BIAS`` come to, by torch, over the first ``width`` slots."""
    queries, slots = BIAS["queries"], BIAS["slots"][:, :width]
    distance = slots - queries
    total = torch.where(distance > 0, float("-inf"), 0.0)[None, None]
    if "table" in parts:
        total = BIAS["table"][:, :, distance.clamp(-3, 1)]
    if "start" in parts:
        hidden = torch.finfo(torch.float32).min / 2
        total = total + torch.where(slots < BIAS["start"], hidden, 0.0)[:, None, None]
    return total + BIAS["mask"][..., :width] if "mask" in parts else total


#: Three queries behind four of eight slots, of two rows.
BIAS = {
    "queries": torch.arange(4, 7)[:, None],
    "slots": torch.arange(8)[None],
    "start": torch.tensor([[0], [5]]),
    "mask": random(2, 1, 3, 8),
    "table": random(1, 2, 5, seed=1).index_fill(2, torch.tensor([1]), float("-inf")),
}


@pytest.mark.parametrize("parts", ["", "start", "mask", "table", "table mask", "start mask table"])
@pytest.mark.parametrize("target", [CPU, STANDARD], ids=["appends", "scatters"])
def test_a_bias_is_spelled_out_for_the_slots_that_attention_reads(
    target: Target, parts: str
) -> None:
    """Up to the last query token's where attention appends, else all; once however often asked."""
    first = torch.full((1 if target is CPU else 2,), 4)
    inputs = BIAS | {"first": first.to(torch.int32) if target is CPU else first}

    def call(op: Ops, w: Any, queries: Any, slots: Any, first: Any, **rest: Any) -> Any:
        optional = {"row_start": "start", "mask": "mask", "table": "table"}
        more = {key: rest[name] for key, name in optional.items() if name in parts}
        bias = Bias(queries, slots, **more, reach=3)
        spelled = op.spelled_out(bias, first)
        assert op.spelled_out(bias, first) is spelled
        return spelled

    expected = spelled_out(parts, 7 if target is CPU else 8)
    found, weights = torch.empty_like(expected), {"unused": torch.zeros(1)}
    graph = build(call, inputs, {"y": expected}, weights, target)
    run(graph, inputs | {"y": found}, weights, target)
    torch.testing.assert_close(found, expected)
    for other in CUDA:
        assert "Slice" not in names(build(call, inputs, {"y": expected}, weights, other))
