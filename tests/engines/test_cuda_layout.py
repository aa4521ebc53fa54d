"""The graphs that ONNX Runtime gets on a GPU, run by its CPU kernels: positions, row starts."""

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastgen.target import Target, onnxruntime_cuda
from tests.configs import DECODERS, Pair, build_pair
from tests.test_parity import outcome

TARGET = replace(onnxruntime_cuda("float32"), device="cpu", captured=False)


@pytest.fixture(autouse=True)
def on_the_graphs_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(options: Any, device: torch.device, dtype: torch.dtype) -> Target:
        return TARGET

    monkeypatch.setattr("fastgen.hf.building.choose_target", choose)


@functools.cache
def pair(name: str) -> Pair:
    """Both models; the Fast one is this module's own, and keeps its engines."""
    both = build_pair(name)
    return Pair(both.stock, copy.deepcopy(both.fast))


@pytest.mark.parametrize("name", [*DECODERS, "bart", "bart-scales", "bart-sizes"])
@pytest.mark.parametrize(
    "mode",
    [
        *("greedy", "sample", "ragged left", "ragged left beams", "beam scores", "continued"),
        *("prompt lookup", "longer than a bucket", "beams longer than a bucket"),
    ],
)
def test_generate_gives_the_same_tokens(name: str, mode: str) -> None:
    models = pair(name)
    expected, found = outcome(models.stock, name, mode), outcome(models.fast, name, mode)
    assert found["sequences"].tolist() == expected["sequences"].tolist()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-4)
    fast: Any = models.fast
    assert fast._engine.target == TARGET
