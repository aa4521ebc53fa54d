"""Operations that speak of single heads: turned by position, normed, and in groups that share keys
and values."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fastgen.ops.standard import Ops
from fastgen.ops.values import Bias, Groups, KVSlots
from fastgen.target import Target
from tests.ops.test_standard import (
    CPU,
    CUDA,
    STANDARD,
    assert_sound,
    attend,
    build,
    check,
    random,
    rms_norm,
    run,
)

FREQUENCIES = [1.0, 0.3, 0.01]


def turned(x: torch.Tensor, positions: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """[B, Q, H*D] as Hugging Face's Llama turns it."""
    angles = (positions[..., None] * torch.tensor(FREQUENCIES)).repeat(1, 1, 2)[:, :, None]
    heads = x.unflatten(-1, (-1, 6))
    first, second = heads.chunk(2, dim=-1)
    half = torch.cat((-second, first), -1)
    return (scale * (heads * angles.cos() + half * angles.sin())).flatten(2)


@pytest.mark.parametrize("scale", [1.0, 1.25])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotary(scale: float, rows: int) -> None:
    """Of positions by row, and of one row of positions for all."""
    x, positions = random(2, 4, 18), torch.tensor([[3, 4, 5, 6], [0, 0, 1, 2]])[:rows]

    def call(op: Ops, w: Any, x: Any, positions: Any) -> Any:
        angles = op.rotary_angles(positions, FREQUENCIES, scale)
        return op.rotary(x, angles, 3)

    expected = turned(x, positions.expand(2, -1), scale)
    check(call, {"x": x, "positions": positions}, expected)


def test_angles_of_far_positions_are_computed_in_float32() -> None:
    x, positions = random(1, 2, 18), torch.tensor([[8191, 120_000]])

    def call(op: Ops, w: Any, x: Any, positions: Any) -> Any:
        return op.rotary(x, op.rotary_angles(positions, FREQUENCIES), 3)

    check(call, {"x": x, "positions": positions}, turned(x, positions))
    inputs = {"x": x, "positions": positions}
    for target in CUDA:
        nodes = assert_sound(build(call, inputs, {"y": x}, {"unused": torch.zeros(1)}, target))
        before = [node.op_type for node in nodes[: [n.op_type for n in nodes].index("Cos")]]
        assert before == ["Unsqueeze", "Cast", "Mul"]


def test_head_norm() -> None:
    x, weight = random(2, 4, 18), random(6, seed=1)
    expected = rms_norm(x.unflatten(-1, (3, 6)), weight, 0.1).flatten(2)
    check(lambda op, w, x: op.head_norm(x, w.norm, 0.1), {"x": x}, expected, norm=weight)


def grouped(op: Ops, w: Any, q: Any, k: Any, v: Any, key: Any, value: Any, **rest: Any) -> Any:
    """Six query heads over two of keys and values."""
    slots = KVSlots(key, value, rest["first_slot"], Groups(count=2, size=3, head_size=4))
    bias = Bias(rest["positions"], rest["slots"], rest["row_start"])
    y, key, value = op.cached_attention(q, k, v, slots, bias, 6, 0.5)
    return {"y": y, "new_key": key, "new_value": value}


@pytest.mark.parametrize("target", [CPU, STANDARD], ids=["appends", "scatters"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("filled", [0, 2])
def test_grouped_queries_share_keys_and_values(queries: int, filled: int, target: Target) -> None:
    slots, length = 8, filled + queries
    q, k, v = random(2, queries, 24), random(2, queries, 8, seed=1), random(2, queries, 8, seed=2)
    buffers = [random(2, 2, slots, 4, seed=i) for i in (5, 6)]
    positions, starts = torch.arange(filled, length)[:, None], torch.tensor([[0], [1]])
    places = torch.arange(length)
    seen = (places <= positions) & (places >= starts[:, :, None])
    bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min / 2)[:, None]
    bias = bias.masked_fill((places > positions)[None, None], float("-inf"))
    expected = [buffer.clone() for buffer in buffers]
    for buffer, new in zip(expected, (k, v), strict=True):
        buffer[:, :, filled:length] = new.unflatten(-1, (2, 4)).transpose(1, 2)
    whole = (buffer[:, :, :length].repeat_interleave(3, dim=1) for buffer in expected)
    y = attend(0.5 * q, *whole, bias)
    inputs: Mapping[str, torch.Tensor] = {
        "q": q,
        "k": k,
        "v": v,
        "key": buffers[0],
        "value": buffers[1],
        "positions": positions,
        "slots": torch.arange(slots)[None],
        "row_start": starts,
        "first_slot": torch.full((2,), filled)
        if target is STANDARD
        else torch.tensor([filled], dtype=torch.int32),
    }
    outputs = {"y": torch.empty_like(y), "new_key": buffers[0], "new_value": buffers[1]}
    weights = {"unused": torch.zeros(1)}
    run(build(grouped, inputs, outputs, weights, target), {**inputs, **outputs}, weights, target)
    torch.testing.assert_close(outputs["y"], y, rtol=1e-5, atol=1e-5)
    for found, right in zip(buffers, expected, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("target", CUDA, ids=[target.dtype for target in CUDA])
def test_a_gpu_gets_as_many_heads_as_keys_have(target: Target) -> None:
    inputs = {"q": random(2, 1, 24), "k": random(2, 1, 8), "v": random(2, 1, 8)}
    inputs |= {"key": random(2, 8, 8), "value": random(2, 8, 8)}
    inputs |= {"positions": torch.tensor([[7]]), "slots": torch.arange(8)[None]}
    inputs |= {"first_slot": torch.zeros(2, dtype=torch.int64)}
    inputs |= {"row_start": torch.zeros(2, 1, dtype=torch.int64)}
    outputs = {"y": inputs["q"], "new_key": inputs["key"], "new_value": inputs["value"]}
    nodes = assert_sound(build(grouped, inputs, outputs, {"unused": torch.zeros(1)}, target))
    (attention,) = [node for node in nodes if node.op_type == "MultiHeadAttention"]
    assert {a.name: a.i for a in attention.attribute}["num_heads"] == 2


def test_a_table_of_positions_is_refused_with_groups() -> None:
    def call(op: Ops, w: Any, q: Any, key: Any, table: Any, **rest: Any) -> Any:
        slots = KVSlots(key, key, rest["first_slot"], Groups(count=1, size=2, head_size=4))
        bias = Bias(rest["positions"], rest["slots"], table=table, reach=3)
        return op.cached_attention(q, q, q, slots, bias, 2)[0]

    inputs = {"q": random(1, 1, 8), "key": random(1, 1, 8, 4), "table": random(1, 2, 5)}
    inputs |= {"positions": torch.tensor([[7]]), "slots": torch.arange(8)[None]}
    inputs |= {"first_slot": torch.zeros(1, dtype=torch.int32)}
    with pytest.raises(ValueError, match="a row for each head"):
        build(call, inputs, {"y": inputs["q"]}, {"unused": torch.zeros(1)})
