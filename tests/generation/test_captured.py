"""The decoding of a GPU (captured steps, a host that runs ahead), run on the CPU beside stock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.generation.calls import GenerateCall, calls
from tests.generation.compare import difference, hangs_on_a_near_tie, run
from tests.generation.emulate import gpu_paths

_settings = settings(
    max_examples=80,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def check(call: GenerateCall, run_ahead: bool) -> None:
    expected = run("stock", call)
    with gpu_paths(run_ahead):
        found = run("fast loop", call)
    # The draws of tokens computed in vain are taken back on a GPU only.
    if differs := difference(expected, found, generator=not run_ahead):
        assert hangs_on_a_near_tie(call), differs


@_settings
@given(calls(on_device=True))
def test_captured_steps_choose_as_the_stock_class(call: GenerateCall) -> None:
    check(call, run_ahead=False)


@_settings
@given(calls(on_device=True) | calls())
def test_tokens_computed_in_vain_are_not_seen(call: GenerateCall) -> None:
    """Not in the outputs, and not by the user's objects."""
    check(call, run_ahead=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_captured_step_serves_later_calls(beams: int) -> None:
    """No prompt or seed changes what a captured step depends on; a temperature does."""
    arguments = {"max_new_tokens": 9, "num_beams": beams, "do_sample": True, "min_new_tokens": 9}
    found: list[set[Any]] = []
    for seed, temperature in ((1, 0.7), (2, 0.7), (3, 1.3)):
        call = GenerateCall("t5-1.1", seed, 2, None, 1, arguments | {"temperature": temperature})
        with gpu_paths() as keys:
            assert not difference(run("stock", call), run("fast loop", call))
        assert len(keys) == 9
        found.append(set(keys))
    assert found[0] == found[1]
    assert not found[0] & found[2]


def keys_of(arguments: dict[str, Any]) -> set[Any]:
    """The captured steps that a beam search takes; it must do what the stock class does."""
    call = GenerateCall("t5-1.1", 1, 2, None, 1, {"max_new_tokens": 9, "num_beams": 3} | arguments)
    with gpu_paths() as keys:
        assert not difference(run("stock", call), run("fast loop", call))
    return set(keys)


@pytest.mark.parametrize(
    "change",
    [
        {"early_stopping": True},
        {"do_sample": True, "top_k": 0},
        {"eos_token_id": [1, 7]},
        {"return_dict_in_generate": True, "output_scores": True},
        {"suppress_tokens": [9]},
        {"num_beams": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_a_step_makes_another(change: dict[str, Any]) -> None:
    assert not keys_of({}) & keys_of(change)


def test_length_penalties_are_data() -> None:
    assert keys_of({}) & keys_of({"length_penalty": 2.0})


@pytest.mark.parametrize(
    "argument", [{"no_repeat_ngram_size": 2}, {"max_time": 3600.0}], ids=lambda a: next(iter(a))
)
def test_what_no_graph_can_hold_is_not_captured(argument: dict[str, Any]) -> None:
    call = GenerateCall("t5-1.1", 1, 2, None, 1, {"max_new_tokens": 4} | argument)
    with gpu_paths() as keys:
        assert not difference(run("stock", call), run("fast loop", call))
    assert not keys


@pytest.mark.parametrize("name", ["in place", "watcher", "half of them"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_users_objects_see_no_token_in_vain(name: str, beams: int) -> None:
    arguments = {"max_new_tokens": 20, "num_beams": beams, "eos_token_id": [*range(20, 90)]}
    arguments |= {"early_stopping": beams > 1}
    call = GenerateCall("t5-1.1", 3, 2, None, 1, arguments, (name,))
    assert run("stock", call)["sequences"].shape[1] < 18, "it is to end early"
    check(call, run_ahead=True)
