"""What decoding loops do on a CPU gives what torch gives, bit for bit."""

import math

import pytest
import torch

from fastgen.generation import cpu

SPECIAL = {
    "nothing": [],
    "nan": [math.nan],
    "inf": [math.inf],
    "zeros": [-0.0, 0.0],
    "equal values": [3.0, 3.0, 3.0],
    "distinct values": [float(value) for value in range(1, 40)],
}


def rows(vocabulary: int, special: str) -> torch.Tensor:
    """[5, V] scores below 0 but for special values, each at two places; the last are all -inf."""
    generator = torch.Generator().manual_seed(vocabulary)
    scores = -torch.rand(5, vocabulary, generator=generator)
    for value in SPECIAL[special]:
        places = torch.randint(vocabulary, (2, 5), generator=generator)
        scores[torch.arange(5), places] = value
    scores[3, : vocabulary // 2] = -math.inf
    scores[4] = -math.inf
    return scores


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("vocabulary", [1, 7, 32_128, 250_112])
def test_argmax(vocabulary: int, special: str) -> None:
    scores = rows(vocabulary, special)
    for given in (scores, scores.double(), scores.repeat(1, 2)[:, :vocabulary]):
        assert cpu.argmax(given).tolist() == torch.argmax(given, dim=-1).tolist()


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("vocabulary", [20, 4_096, 5_001, 32_128])
@pytest.mark.parametrize("k", [1, 8, 16])
@pytest.mark.parametrize("added", [0.0, -1e9, math.nan])
def test_topk_of_sums(vocabulary: int, special: str, k: int, added: float) -> None:
    scores = rows(vocabulary, special)
    running = -torch.rand(5, generator=torch.Generator().manual_seed(k))
    running[1] += added
    for order in ([0, 1, 2, 3], [4, 3, 2, 1], [0], [4]):
        values = scores[order].view(-1, min(2, len(order)), vocabulary)
        sums = running[order].view(values.shape[:2])
        for dtype in (torch.float32, torch.float64):
            found = cpu.topk_of_sums(values.to(dtype), sums.to(dtype), k)
            flat = (values.to(dtype) + sums.to(dtype)[:, :, None]).flatten(1)
            expected = torch.topk(flat, k)
            assert torch.equal(found[1], expected.indices)
            torch.testing.assert_close(found[0], expected.values, rtol=0, atol=0, equal_nan=True)


def test_distinct_values_need_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.linspace(-5, 5, 128_514)[torch.randperm(128_514)].view(1, 2, -1)
    expected = torch.topk(values.flatten(1), 8)
    monkeypatch.setattr(torch, "topk", None)
    found = cpu.topk_of_sums(values, torch.zeros(1, 2), 8)
    assert torch.equal(found[0], expected.values)
    assert torch.equal(found[1], expected.indices)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("count", [1, 4, 64])
def test_log_softmax(count: int, special: str) -> None:
    logits = rows(32_128, special).repeat(count, 1)[:count]
    for given in (logits, logits.double()):
        expected = torch.log_softmax(given, dim=-1)
        found = cpu.log_softmax(given, out=None)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
