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
@pytest.mark.parametrize("vocabulary", [20, 4_096, 5_001, 128_512])
@pytest.mark.parametrize("k", [1, 8, 16])
def test_topk(vocabulary: int, special: str, k: int) -> None:
    scores = rows(vocabulary, special)
    for given in (scores[:1], scores[:4], scores, scores.double(), scores[:3].repeat(1, 2)[:, ::2]):
        values, indices = cpu.topk(given, k)
        expected = torch.topk(given, k)
        assert torch.equal(indices, expected.indices)
        torch.testing.assert_close(values, expected.values, rtol=0, atol=0, equal_nan=True)


def test_distinct_values_need_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.linspace(-5, 5, 128_512)[torch.randperm(128_512)].repeat(2, 1)
    expected = torch.topk(scores, 8)
    monkeypatch.setattr(torch, "topk", None)
    values, indices = cpu.topk(scores, 8)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("count", [1, 4, 64])
def test_log_softmax(count: int, special: str) -> None:
    logits = rows(32_128, special).repeat(count, 1)[:count]
    for given in (logits, logits.double()):
        expected = torch.log_softmax(given, dim=-1)
        torch.testing.assert_close(cpu.log_softmax(given), expected, rtol=0, atol=0, equal_nan=True)
