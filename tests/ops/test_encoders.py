"""What encoders add to the vocabulary: scaled attention without position tables, packed rows."""

from typing import Any

import pytest
import torch

from fastgen.execution.packing import Packing
from fastgen.ops.standard import Ops
from tests.ops.test_standard import attend, check, random

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_scaled_before_its_bias(scale: float, masked: bool) -> None:
    q, k, v = (random(3, 4, 12, seed=i) for i in range(3))
    heads = [x.unflatten(-1, (3, 4)).transpose(1, 2) for x in (k, v)]
    hidden = torch.where(MASK.bool(), 0.0, float("-inf"))[:, None, None]
    bias = hidden if masked else torch.zeros(1, 1, 1, 4)

    def call(op: Ops, w: Any, q: Any, k: Any, v: Any, mask: Any, positions: Any) -> Any:
        mask = op.for_queries(op.mask_bias(mask), positions)
        return op.attention(q, k, v, mask if masked else None, 3, scale)

    inputs = {"q": q, "k": k, "v": v, "mask": MASK, "positions": torch.arange(4)[:, None]}
    check(call, inputs, attend(scale * q, *heads, bias))


def test_packed_rows_are_spread_and_packed_again() -> None:
    """By the graph as by the host; the first place of each row is always kept."""
    packing, packed = Packing.of(MASK), random(1, 10, 6)
    kept = MASK.bool() | (torch.arange(4) == 0)
    assert packing.tokens.tolist() == kept.flatten().nonzero().flatten().tolist()
    spread = packing.spread(packed)
    torch.testing.assert_close(spread[kept], packed[0])
    assert not spread[~kept].any()
    assert packing.pack(MASK).tolist() == [MASK[kept].tolist()]

    def there_and_back(op: Ops, w: Any, x: Any, places: Any, tokens: Any) -> Any:
        rows = op.spread(x, places)
        return {"rows": rows, "packed": op.pack(rows, tokens)}

    inputs = {"x": packed, "places": packing.places, "tokens": packing.tokens}
    check(there_and_back, inputs, {"rows": packed[0][packing.places], "packed": packed})
