"""What a decoding call leaves behind, and the debug mode that runs both loops."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from fastgen import EngineOptions
from fastgen.errors import FastgenError
from fastgen.execution.decoder import Decoder
from fastgen.generation import loop
from tests.configs import build_pair, prompts
from tests.generation.calls import GenerateCall, outcome
from tests.generation.compare import difference, models, run
from tests.modes import Recorder

NAME = "t5-1.1"


def fresh(**options: Any) -> Any:
    """A Fast model of its own for one test."""
    model = copy.deepcopy(build_pair(NAME).fast)
    model.engine_options = EngineOptions(**options)
    return model


def states(model: Any) -> list[Any]:
    """What the model's decoding loops keep between calls."""
    return [state for kept in model._current_engine().states.values() for state in kept]


@pytest.mark.parametrize("beams", [1, 2])
def test_states_are_reused_and_bounded(beams: int) -> None:
    model = fresh(max_cached_graphs=3)
    for rows in (1, 2, 2, 3, 4, 5, 1):
        model.generate(prompts(NAME, rows), num_beams=beams, max_new_tokens=3)
        assert len(states(model)) <= 3
    before = states(model)
    model.generate(prompts(NAME, 1), num_beams=beams, max_new_tokens=3)
    assert all(new is old for new, old in zip(states(model), before, strict=True))


@pytest.mark.parametrize("beams", [1, 2])
def test_running_out_of_memory_leaves_no_state_in_use(beams: int) -> None:
    model = fresh()
    call: dict[str, Any] = {"inputs": prompts(NAME, 2), "num_beams": beams, "max_new_tokens": 5}
    expected = model.generate(**call)
    error = torch.OutOfMemoryError("no room for a bucket")
    with mock.patch.object(Decoder, "enter", side_effect=error), pytest.raises(type(error)):
        model.generate(**call)
    assert not any(state.busy for state in states(model))
    assert model.generate(**call).tolist() == expected.tolist()


@pytest.mark.parametrize("argument", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("beams", [1, 2])
def test_an_error_of_the_users_objects_leaves_no_state_in_use(argument: str, beams: int) -> None:
    def fail(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        raise KeyError("mine")

    model = fresh()
    call: dict[str, Any] = {"inputs": prompts(NAME, 2), "num_beams": beams, "max_new_tokens": 5}
    expected = model.generate(**call)
    with pytest.raises(KeyError, match="mine"):
        model.generate(**call, **{argument: [fail]})
    assert not any(state.busy for state in states(model))
    assert model.generate(**call).tolist() == expected.tolist()


def test_a_streamer_may_generate() -> None:
    model, pieces = fresh(), []

    class Nested(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            pieces.append(model.generate(prompts(NAME, 1, seed=5), max_new_tokens=4).tolist())

    alone = model.generate(prompts(NAME, 1), max_new_tokens=6)
    inner = model.generate(prompts(NAME, 1, seed=5), max_new_tokens=4).tolist()
    streamer = Nested()
    outer = model.generate(prompts(NAME, 1), max_new_tokens=6, streamer=streamer)
    assert outer.tolist() == alone.tolist()
    assert len(pieces) == alone.shape[1] and all(piece == inner for piece in pieces)


@pytest.mark.parametrize("beams", [1, 3])
def test_threads_share_a_model(beams: int) -> None:
    model = fresh(min_bucket=4)
    calls = [
        {"inputs": prompts(NAME, 1 + seed % 3, seed=seed), "num_beams": beams, "max_new_tokens": 9}
        for seed in range(12)
    ]
    expected = [model.generate(**call).tolist() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: model.generate(**call).tolist(), calls))
    assert found == expected


def test_a_streamer_may_wait_for_a_call_of_another_thread() -> None:
    model = fresh()
    call: dict[str, Any] = {"inputs": prompts(NAME, 2), "max_new_tokens": 5}
    expected = model.generate(**call).tolist()

    class Waiting(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            assert pool.submit(lambda: model.generate(**call)).result(60).tolist() == expected

        def end(self) -> None:
            pass

    with ThreadPoolExecutor(1) as pool:
        streamed = model.generate(prompts(NAME, 1), max_new_tokens=3, streamer=Waiting())
    assert streamed.tolist() == model.generate(prompts(NAME, 1), max_new_tokens=3).tolist()


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_without_an_end_token(beams: int, sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in models(NAME).values():
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    arguments = {"max_new_tokens": 9, "num_beams": beams, "do_sample": sample}
    call = GenerateCall(NAME, 3, 2, None, 1, arguments | {"return_dict_in_generate": True})
    expected = run("stock", call)
    assert expected["sequences"].shape == (2, 10)
    assert not difference(expected, run("fast loop", call))


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_debug_mode_returns_the_same(arguments: dict[str, Any]) -> None:
    model = fresh(check_fast_loop=True)
    call = GenerateCall(NAME, 3, 2, "left", 1, {"max_new_tokens": 7} | arguments)
    assert not difference(run("stock", call), outcome(model, call))


def test_debug_mode_reports_a_difference() -> None:
    model = fresh(check_fast_loop=True)
    sample = loop.sample
    with (
        mock.patch.object(loop, "sample", lambda call: sample(call) + 1),
        pytest.raises(FastgenError, match="check_fast_loop"),
    ):
        model.generate(prompts(NAME, 2), max_new_tokens=4)


def transposed(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """What a user's processor may give: scores that are not contiguous."""
    return scores.t().contiguous().t()


@pytest.mark.parametrize(
    "arguments", [{"logits_processor": [transposed]}, {"length_penalty": 200.0}]
)
def test_beam_search_takes_what_the_stock_class_takes(arguments: dict[str, Any]) -> None:
    pair = build_pair(NAME)
    call: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 12, **arguments}
    expected = pair.stock.generate(prompts(NAME), **call)
    assert pair.fast.generate(prompts(NAME), **call).tolist() == expected.tolist()
