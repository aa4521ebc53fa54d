"""The fast loop on the GPU: the HF loop's tokens, few captures, flat memory, threads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastgen import EngineOptions, cuda_graph
from tests.configs import build_pair, prompts
from tests.generation.calls import GenerateCall, calls, outcome
from tests.generation.compare import (
    Place,
    difference,
    hangs_on_a_near_tie,
    loops_run,
    models,
    run,
    tokens,
)
from tests.gpu.memory import used

pytestmark = pytest.mark.cuda

FLOAT32 = Place("cuda", torch.float32, rounding=1e-3)
BFLOAT16 = Place("cuda", torch.bfloat16, rounding=3e-2)
PLACES = pytest.mark.parametrize("place", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
NAME = "t5-1.1"

#: Both loops run the same kernels on the same shapes here, so every bit is the same.
SAME_KERNELS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy penalties": {"repetition_penalty": 1.6, "min_new_tokens": 6, "suppress_tokens": [9]},
    "greedy forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 1, "min_length": 4},
    "greedy eager": {"no_repeat_ngram_size": 2, "bad_words_ids": [[5, 6], [8]]},
    "several ends": {"eos_token_id": [1, *range(20, 60)], "pad_token_id": 5},
    "sample": {"do_sample": True, "top_k": 0},
    "sample cut-offs": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    "sample others": {"do_sample": True, "min_p": 0.02, "typical_p": 0.8, "eta_cutoff": 0.01},
    "sample several": {"do_sample": True, "num_return_sequences": 3, "renormalize_logits": True},
    "sample eager": {"do_sample": True, "sequence_bias": {(5,): 3.0, (4, 5): -2.0}},
    "scores": {"do_sample": True, "output_scores": True, "output_logits": True},
}
#: Beams are rows of a batch in the HF loop and query tokens in ours: rounding may differ.
BEAMS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4},
    "beams penalties": {"num_beams": 3, "repetition_penalty": 1.4, "min_length": 5},
    "beams eager": {"num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": 2.0},
    "beams early": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 3},
    "beams never early": {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5},
    "beam sample": {"num_beams": 3, "do_sample": True, "top_k": 30, "temperature": 1.3},
    "beam scores": {"num_beams": 3, "output_scores": True, "output_logits": True},
}


def call_of(arguments: dict[str, Any], seed: int = 3, **fields: Any) -> GenerateCall:
    """A ragged batch of three rows, and a dictionary of outputs."""
    wanted = {"max_new_tokens": 14, "return_dict_in_generate": True} | arguments
    fields = {"rows": 3, "padding": "right", "prompt": 1} | fields
    return GenerateCall(NAME, seed, arguments=wanted, **fields)


def assert_equal_loops(call: GenerateCall, place: Place) -> None:
    """Every bit that the HF loop on the same engine gives, the generator's state included."""
    expected = run("HF loop", call, place)
    assert "error" not in expected
    with loops_run() as ran:
        found = run("fast loop", call, place)
    assert ran == ["beam_search" if call.beams > 1 else "sample"]
    assert difference(expected, found) == ""


@contextmanager
def captures() -> Iterator[list[Any]]:
    """The CUDA graphs that the body captures."""
    made: list[Any] = []

    class Spy(cuda_graph.CapturedGraph):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            super().__init__(*args, **kwargs)

    with mock.patch.object(cuda_graph, "CapturedGraph", Spy):
        yield made


def fresh(**options: Any) -> Any:
    """A Fast model of its own for one test."""
    model = copy.deepcopy(build_pair(NAME).fast).to("cuda")
    model.engine_options = EngineOptions(**options)
    return model


# The same as the HF loop


@PLACES
@pytest.mark.parametrize("mode", SAME_KERNELS)
def test_every_bit_of_the_hf_loop(mode: str, place: Place) -> None:
    assert_equal_loops(call_of(SAME_KERNELS[mode]), place)


@PLACES
@pytest.mark.parametrize("sample", [False, True])
def test_streamer(sample: bool, place: Place) -> None:
    call = call_of({"do_sample": sample}, rows=1, padding=None, objects=("streamer",))
    assert_equal_loops(call, place)


@PLACES
@pytest.mark.parametrize("name", ["in place", "watcher", "own eos", "own max length"])
def test_objects_of_the_user(name: str, place: Place) -> None:
    assert_equal_loops(call_of({"do_sample": True}, objects=(name,)), place)


@PLACES
@pytest.mark.parametrize("mode", BEAMS)
def test_beams(mode: str, place: Place) -> None:
    check(call_of(BEAMS[mode]), place)


def check(call: GenerateCall, place: Place) -> bool:
    """Compare the loops; gives whether they differ, which only a near tie excuses."""
    expected, found = run("HF loop", call, place), run("fast loop", call, place)
    if place == BFLOAT16:  # values differ by more than float32's tolerance
        expected, found = tokens(expected), tokens(found)
    differs = difference(expected, found)
    assert not differs or hangs_on_a_near_tie(call, place), differs
    return bool(differs)


@pytest.mark.parametrize("on_device", [True, False], ids=["captured", "any"])
@PLACES
def test_random_calls(on_device: bool, place: Place) -> None:
    differ: list[GenerateCall] = []

    @settings(
        max_examples=60,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(on_device=on_device))
    def look(call: GenerateCall) -> None:
        # what fails on the CPU (no token left to draw) would end the CUDA context
        if "error" not in run("stock", call) and check(call, place):
            differ.append(call)

    look()
    assert len(differ) <= (2 if place == FLOAT32 else 12), "too many to be near ties"


# Captured steps


@pytest.mark.parametrize("beams", [1, 3])
def test_graphs_serve_other_prompts(beams: int) -> None:
    model = fresh()
    arguments = {"num_beams": beams, "do_sample": True, "repetition_penalty": 1.3}
    some = [call_of(arguments | {"min_new_tokens": 14}, seed=seed) for seed in range(1, 5)]
    expected = [run("HF loop", call, FLOAT32) for call in some]
    with captures() as made:
        found = [outcome(model, some[0])]
        first = len(made)
        found += [outcome(model, call) for call in some[1:]]
    assert 0 < first == len(made)
    for one, other, call in zip(expected, found, some, strict=True):
        assert not difference(one, other) or hangs_on_a_near_tie(call, FLOAT32)


def test_a_changed_temperature_is_seen() -> None:
    model = fresh()
    for temperature in (0.3, 2.5, 0.3, 1.0, 2.5):
        call = call_of({"do_sample": True, "temperature": temperature})
        assert difference(run("HF loop", call, FLOAT32), outcome(model, call)) == ""


@pytest.mark.parametrize("beams", [1, 3])
def test_growing_in_mid_generation(beams: int) -> None:
    """min_bucket is 4 in these models: 40 tokens pass through five buckets."""
    call = call_of({"num_beams": beams, "max_new_tokens": 40, "min_new_tokens": 40})
    check(call, FLOAT32)
    assert run("fast loop", call, FLOAT32)["sequences"].shape[1] == 41


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("new", [1, 2, 3, 6])
def test_captures_at_the_last_place_of_a_bucket(new: int, beams: int) -> None:
    """Warm-up runs before a capture must not write past the end."""
    model = fresh(min_bucket=4)
    for prompt in (1, 2, 3, 6):
        arguments = {"num_beams": beams, "max_new_tokens": new, "min_new_tokens": new}
        call = call_of(arguments, prompt=prompt)
        assert difference(run("HF loop", call, FLOAT32), outcome(model, call)) == ""


def test_on_a_stream_of_the_user() -> None:
    model, stream = fresh(), torch.cuda.Stream()
    call = call_of({"do_sample": True})
    expected = outcome(model, call)
    with torch.cuda.stream(stream):
        found = outcome(model, call)
    stream.synchronize()
    assert difference(expected, found) == ""


def test_without_cuda_graphs() -> None:
    model = fresh(cuda_graphs=False)
    for arguments in ({"do_sample": True}, {"num_beams": 3}):
        call = call_of(arguments)
        with captures() as made:
            found = outcome(model, call)
        assert not made
        assert difference(run("HF loop", call, FLOAT32), found) == ""


# Many calls


def mixed(number: int) -> dict[str, Any]:
    """The arguments of one of many calls: modes, batch sizes and lengths take turns."""
    modes: list[dict[str, Any]] = [
        {},
        {"num_beams": 3},
        {"repetition_penalty": 1.2 + number % 3},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 2, "length_penalty": 2.0},
        {"min_new_tokens": 5},
    ]
    rows, length = 1 + number % 4, 5 + number % 30
    ids = prompts(NAME, rows, length, seed=number).to("cuda")
    return {"inputs": ids, "max_new_tokens": 4 + number % 20, **modes[number % len(modes)]}


def test_threads_share_a_model() -> None:
    model = fresh(min_bucket=8)
    numbers = range(48)
    expected = [model.generate(**mixed(number)).tolist() for number in numbers]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: model.generate(**mixed(number)).tolist(), numbers))
    assert found == expected


def test_threads_meet_a_cold_model() -> None:
    """The threads capture while others run."""
    expected = [fresh().generate(**mixed(number)).tolist() for number in range(8)]
    model = fresh()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: model.generate(**mixed(number)).tolist(), range(8)))
    assert found == expected


def test_memory_is_flat() -> None:
    model = fresh(min_bucket=8)
    for number in range(120):  # 60 kinds of calls, twice
        model.generate(**mixed(number))
    before, allocated = used(), torch.cuda.memory_allocated()
    for number in range(120, 360):
        model.generate(**mixed(number))
    assert torch.cuda.memory_allocated() <= allocated + 2**20
    assert used() <= before + 2**26


def test_the_stock_class_agrees() -> None:
    """The two loops could be wrong alike."""
    for arguments in ({}, {"do_sample": True, "top_k": 10}, {"num_beams": 4}):
        call = call_of(arguments)
        found = models(NAME, FLOAT32)["fast loop"].generate(**mixed(0))
        assert found.tolist() == models(NAME, FLOAT32)["stock"].generate(**mixed(0)).tolist()
        differs = difference(run("stock", call, FLOAT32), run("fast loop", call, FLOAT32))
        assert not differs or hangs_on_a_near_tie(call, FLOAT32), differs
