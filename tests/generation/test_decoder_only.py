"""``generate`` without an encoder: where positions end, padding, and the paths that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastgen
from fastgen.hf import contract, trial
from tests.configs import build_pair, prompts
from tests.generation.emulate import gpu_paths

POSITIONS = 96  # that the tiny models know
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True},
    "beams": {"num_beams": 3},
    "streamed": {"streamer": True},
}


@contextmanager
def options(model: Any, **changed: Any) -> Iterator[None]:
    kept = model.engine_options
    model.engine_options = changed
    try:
        yield
    finally:
        model.engine_options = kept


class Streamer:
    """Takes tokens and keeps none."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


def outcome(model: Any, ids: torch.Tensor, **call: Any) -> Any:
    """The tokens of a call, or the type of its error."""
    if call.pop("streamer", None):
        ids, call["streamer"] = ids[:1], Streamer()
    call = {"attention_mask": torch.ones_like(ids)} | call
    torch.manual_seed(4)
    try:
        return model.generate(ids, **call).tolist()
    except IndexError:
        return IndexError


@pytest.mark.parametrize("fast_loop", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "new", "fails"),
    [(90, 7, False), (90, 8, True), (96, 1, False), (96, 2, True), (97, 1, True)],
)
def test_a_row_beyond_the_last_position(
    prompt: int, new: int, fails: bool, kind: str, fast_loop: bool
) -> None:
    """As stock: the token at the last position still gives one, the next is an error."""
    pair = build_pair("gpt2")
    ids = prompts("gpt2", 2, prompt)
    call = {"max_new_tokens": new, "min_new_tokens": new, **KINDS[kind]}
    with options(pair.fast, fast_loop=fast_loop):
        found = [outcome(model, ids, **call) for model in (pair.stock, pair.fast)]
    assert found[0] == found[1]
    assert (found[0] is IndexError) == fails


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize("kind", ["greedy", "beams"])
def test_rows_that_end_in_time_are_no_error(kind: str, run_ahead: bool) -> None:
    """Nor where the host runs ahead of what it knows."""
    pair, ids = build_pair("gpt2"), prompts("gpt2", 2, 92)
    call: dict[str, Any] = {"eos_token_id": [*range(1, 70)], "max_new_tokens": 40, **KINDS[kind]}
    call |= {"early_stopping": True} if kind == "beams" else {}
    expected = outcome(pair.stock, ids, **call)
    assert expected is not IndexError
    with gpu_paths(run_ahead):
        assert outcome(pair.fast, ids, **call) == expected


@pytest.mark.parametrize("kind", ["greedy", "beams"])
def test_padding_of_every_row_leaves_places_behind(kind: str) -> None:
    """Positions count from a row's first token, not from the padding."""
    pair, ids = build_pair("gpt2"), prompts("gpt2", 2, 93)
    mask = (torch.arange(93) >= torch.tensor([[10], [12]])).long()
    call = {"attention_mask": mask, "min_new_tokens": 14, **KINDS[kind]}
    for new in (14, 15):
        expected = outcome(pair.stock, ids * mask, **call, max_new_tokens=new)
        assert outcome(pair.fast, ids * mask, **call, max_new_tokens=new) == expected


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize(
    "call",
    [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 3, "do_sample": True}],
    ids=["greedy", "sample", "beams", "beam sample"],
)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["numpy", "torch"])
def test_captured_steps_serve_prompts_of_every_length(
    call: dict[str, Any], run_ahead: bool, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams share the prompt's slots, whose number no captured step depends on."""
    pair, made = build_pair("gpt2"), []
    if not on_cpu:  # what follows a step is then the code that a GPU runs
        monkeypatch.setattr("fastgen.generation.cpu.served", lambda scores: False)
        pair.fast.invalidate_engine()
    for length in (5, 8, 1, 3):
        ids = prompts("gpt2", 2, length)
        arguments = {**call, "max_new_tokens": 9}
        expected = outcome(pair.stock, ids, **arguments)
        with gpu_paths(run_ahead) as keys:
            assert outcome(pair.fast, ids, **arguments) == expected
        made.append(set(keys))
    assert all(made)
    assert made[0] == made[1] == made[3], "another prompt takes the same steps"


#: Calls and the path that they take.
PATHS: dict[str, tuple[dict[str, Any], str]] = {
    "a mask of ones": ({"attention_mask": torch.ones(3, 9).long()}, "fast loop"),
    "left padding": (
        {"attention_mask": (torch.arange(9) >= torch.tensor([[0], [3], [8]])).long()},
        "fast loop",
    ),
    "left padding, beams": (
        {"attention_mask": (torch.arange(9) >= torch.tensor([[0], [3], [8]])).long()}
        | {"num_beams": 2},
        "fast loop",
    ),
    "right padding": (
        {"attention_mask": (torch.arange(9) < torch.tensor([[9], [3], [8]])).long()},
        "torch",
    ),
    "its own positions": ({"position_ids": torch.arange(9)[None].expand(3, -1)}, "fast loop"),
    "other positions": ({"position_ids": torch.arange(2, 11)[None].expand(3, -1)}, "torch"),
    "token types": ({"token_type_ids": torch.ones(3, 9).long()}, "torch"),
    "logits to keep": ({"logits_to_keep": 4}, "fast loop"),
    "no KV cache": ({"use_cache": False}, "HF loop"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "HF loop"),
}


@pytest.mark.parametrize("case", PATHS)
@pytest.mark.filterwarnings("ignore::fastgen.FallbackWarning")
def test_a_call_takes_the_path_that_explain_names(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = build_pair("gpt2")
    fast: Any = pair.fast
    call, path = PATHS[case]
    rows = 1 if case == "prompt lookup" else 3
    call = {"input_ids": prompts("gpt2", rows), "max_new_tokens": 6, **call}
    assert fast.explain(**call).path == path
    steps: list[str] = []
    run = type(fast)._run
    monkeypatch.setattr(
        type(fast), "_run", lambda self, **kw: (steps.append("engine"), run(self, **kw))[1]
    )
    stock_forward = type(pair.stock).forward
    monkeypatch.setattr(
        type(pair.stock),
        "forward",
        lambda self, *a, **kw: (steps.append("torch"), stock_forward(self, *a, **kw))[1],
    )
    found = fast.generate(**call).tolist()
    assert {"fast loop": set(), "HF loop": {"engine"}, "torch": {"torch"}}[path] == set(steps)
    monkeypatch.undo()
    assert found == pair.stock.generate(**call).tolist()


def test_explain_says_how_a_kv_cache_goes_on() -> None:
    fast: Any = build_pair("gpt2").fast
    ids = prompts("gpt2")
    first = fast.generate(ids, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    kept = {contract.CACHE: first[contract.CACHE]}
    explanation = fast.explain(input_ids=first.sequences, **kept)
    assert explanation.path == "HF loop" and "already holds tokens" in str(explanation)


@pytest.mark.parametrize("call", [{}, {"num_beams": 2}, {"do_sample": True}])
@pytest.mark.parametrize("fast_loop", [True, False])
def test_a_prompt_of_int32(fast_loop: bool, call: dict[str, Any]) -> None:
    pair, ids = build_pair("gpt2"), prompts("gpt2").int()
    with options(pair.fast, fast_loop=fast_loop):
        found = [outcome(model, ids, max_new_tokens=5, **call) for model in (pair.stock, pair.fast)]
    assert found[0] == found[1]


@pytest.mark.parametrize("call", [{}, {"num_beams": 2}])
def test_both_loops_agree(call: dict[str, Any]) -> None:
    fast: Any = build_pair("gpt2").fast
    with options(fast, check_fast_loop=True):
        fast.generate(prompts("gpt2"), max_new_tokens=8, **call)  # raises where they differ


def test_a_trial_runs_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not torch beside torch."""
    refused: list[str] = []
    own = fastgen.FastGPT2LMHeadModel
    looked = own.refusal

    def refusal(self: Any, **kwargs: Any) -> str | None:
        reason = looked(self, **kwargs)
        refused.extend([reason] if reason else [])
        return reason

    monkeypatch.setattr(own, "refusal", refusal)
    assert set(trial._try(own).values()) == {"fast loop", "HF loop"}
    assert not refused
