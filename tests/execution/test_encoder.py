"""The encoder's captured graphs, on the CPU: padded sizes, their number, and what padding hides."""

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from fastgen.execution import capturing
from fastgen.execution.capturing import Capturing
from fastgen.execution.encoder import Encoder
from fastgen.options import EngineOptions
from fastgen.target import Target, onnxruntime_cpu, onnxruntime_cuda, tensorrt
from tests.configs import Pair, build_pair
from tests.generation.emulate import gpu_paths

SOURCES_FOR = Capturing.sources_for
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def padded() -> Iterator[None]:
    """As on a GPU: graphs are captured, of sizes in steps of 8 tokens."""
    sizes = mock.patch.object(Capturing, "sources_for", lambda self, sources: -(-sources // 8) * 8)
    with gpu_paths(), sizes, torch.no_grad():
        yield


def pair_of(name: str) -> Pair:
    return copy.deepcopy(build_pair(name))  # what it captures here is its own


def ids(rows: int, sources: int) -> torch.Tensor:
    return torch.randint(3, 50, (rows, sources), generator=torch.Generator().manual_seed(sources))


@pytest.mark.parametrize("masked", [False, True])
def test_padding_and_earlier_calls_change_nothing(masked: bool) -> None:
    pair = pair_of("t5-1.1")
    for sources in (7, 16, 3, 8, 11):
        call: dict[str, Any] = {"input_ids": ids(2, sources)}
        if masked:
            call["attention_mask"] = torch.ones_like(call["input_ids"])
            call["attention_mask"][1, sources // 2 :] = 0
        found = pair.fast.encoder(**call).last_hidden_state
        expected = pair.stock.encoder(**call).last_hidden_state
        assert found.shape == expected.shape
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, **CLOSE)
        tokens = pair.fast.generate(call["input_ids"], max_new_tokens=5)
        assert torch.equal(tokens, pair.stock.generate(call["input_ids"], max_new_tokens=5))


def test_results_of_earlier_calls_stay() -> None:
    encoder = pair_of("t5-1.0").fast.encoder
    first = encoder(input_ids=ids(2, 7)).last_hidden_state
    kept = first.clone()
    encoder(input_ids=ids(2, 8))
    assert torch.equal(first, kept)


def test_graphs_are_as_many_as_the_options_say() -> None:
    model: Any = pair_of("t5-1.0").fast
    model.engine_options = EngineOptions(max_cached_graphs=2)
    for sources in (3, 9, 17, 9, 25):
        model.encoder(input_ids=ids(1, sources))
    encoder: Encoder = model.encoder._current_engine()
    assert list(encoder._replays) == [(1, 16), (1, 32)]


def test_what_waits_for_its_products_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "CAPTURED_TOKENS", 16)
    model: Any = pair_of("t5-1.0").fast
    for rows, sources in ((2, 9), (1, 17)):
        model.encoder(input_ids=ids(rows, sources))
    encoder: Encoder = model.encoder._current_engine()
    assert not encoder._replays


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (onnxruntime_cpu(), [1, 33, 257, 300]),
        (onnxruntime_cuda("float32"), [32, 64, 320, 320]),
        (tensorrt("float16", "tensorrt"), [32, 64, 300, 300]),  # its plans end at 300
    ],
)
def test_sizes(target: Target, expected: list[int]) -> None:
    sides = Capturing(target, torch.device("cpu"), EngineOptions(max_source_tokens=300))
    assert [SOURCES_FOR(sides, sources) for sources in (1, 33, 257, 300)] == expected
