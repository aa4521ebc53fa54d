"""Fingerprints of weights: what tells of edits that torch keeps no count of."""

import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from fastgen.hf import weights
from fastgen.hf.weights import Fingerprint


@pytest.fixture(params=["one thread", "three threads", "no thread to be had"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Threads that look at a matrix of a few rows, two rows at a time."""
    if request.param == "one thread":
        return 1
    if request.param == "no thread to be had":
        monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError))
    monkeypatch.setattr(weights, "_PIECE", 64)
    monkeypatch.setattr(weights, "_WORTH_A_THREAD", 32)
    return 3


@pytest.mark.parametrize("columns", [7, 8])
def test_fingerprints_tell_what_changed(columns: int, threads: int) -> None:
    matrix = torch.randn(5, columns)
    whole = torch.nn.Parameter(matrix)
    fingerprint = Fingerprint([whole, whole], threads)
    assert len(fingerprint._shares) == threads
    assert fingerprint.same()
    edits: list[Callable[[torch.Tensor], Any]] = [
        lambda m: m[2:3].mul_(2),
        lambda m: m[:, 3:4].neg_(),
        lambda m: m.copy_(m[[1, 0, 2, 3, 4]]),
        lambda m: m.copy_(m[:, [1, 0, *range(2, columns)]]),
        lambda m: m[4, 2].add_(1e-6),
        lambda m: m[0, 0].fill_(torch.nan),
    ]
    for edit in edits:
        fingerprint = Fingerprint([whole], threads)
        edit(whole.data)
        assert not fingerprint.same()
