"""Memory goes back when its last user does: nothing waits for Python's cycle collector."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from fastgen.execution.bucket import Bucket
from tests.generation.emulate import gpu_paths
from tests.helpers import copies

KINDS: list[dict[str, Any]] = [
    {},
    {"num_beams": 2},
    {"repetition_penalty": 1.3},
    {"do_sample": True},
    {"num_beams": 3, "no_repeat_ngram_size": 2},
]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No cycle collector during the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("captured", [False, True])
def test_buckets_are_freed_at_once(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a model does not keep, with the steps captured over them."""
    alive: weakref.WeakSet[Bucket] = weakref.WeakSet()
    allocate = Bucket.__init__

    def spy(self: Bucket, *args: Any) -> None:
        allocate(self, *args)
        alive.add(self)

    monkeypatch.setattr(Bucket, "__init__", spy)
    model = copies("t5-1.0").fast
    model.engine_options = {"min_bucket": 8, "max_cached_graphs": 2}
    with ExitStack() as stack:
        if captured:
            stack.enter_context(gpu_paths())
        for rows in range(1, 7):
            for kind in KINDS:
                ids = torch.full((rows, 5), 7)
                model.generate(ids, max_new_tokens=20, min_new_tokens=20, **kind)
                assert 0 < len(alive) <= 2
    model.invalidate_engine()
    assert not alive


@pytest.mark.usefixtures("uncollected")
def test_a_model_is_freed_at_once() -> None:
    model = copies("t5-1.0").fast
    for kind in KINDS:
        model.generate(torch.full((2, 5), 7), max_new_tokens=4, **kind)
    parts = [model, model._engine, model.encoder._engine, model.lm_head.weight]
    alive = [weakref.ref(part) for part in parts]
    del model, parts
    assert [part() for part in alive] == [None] * 4
