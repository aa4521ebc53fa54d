"""A call of ``generate`` whose like came before begins at its first token, and gives the same."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from fastgen.generation import known
from fastgen.generation.loop import Loop
from fastgen.hf.weights import Glance
from tests.configs import Pair, build_pair, prompts
from tests.generation.emulate import gpu_paths

NAMES = ("t5-1.1", "bart", "gpt2")
LENGTH = {"max_new_tokens": 6}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "sample": {"do_sample": True, "top_k": 7, "num_return_sequences": 2},
    "processors": {"min_new_tokens": 3, "repetition_penalty": 1.3, "forced_eos_token_id": [1]},
    "outputs": {"return_dict_in_generate": True, "output_scores": True},
}


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often ``generate`` came through stock's Python."""
    count, noting = [0], known.noting

    def spy() -> Any:
        count[0] += 1
        return noting()

    with mock.patch.object(known, "noting", spy):
        yield count


def both(pair: Pair, inputs: torch.Tensor | None, **kwargs: Any) -> tuple[Any, Any]:
    """What both models generate, drawing the same numbers."""
    results = []
    for model in (pair.stock, pair.fast):
        torch.manual_seed(0)
        results.append(model.generate(inputs, **copy.deepcopy(kwargs)))
    return results[0], results[1]


def assert_same(pair: Pair, inputs: torch.Tensor | None, **kwargs: Any) -> None:
    expected, found = both(pair, inputs, **kwargs)
    if torch.is_tensor(expected):
        assert torch.equal(expected, found)
    else:
        assert torch.equal(expected.sequences, found.sequences)
        torch.testing.assert_close(expected.scores, found.scores, rtol=1e-4, atol=1e-3)


def fresh(name: str) -> Pair:
    return copy.deepcopy(build_pair(name))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_call_like_one_before_is_not_prepared_again(name: str, mode: str) -> None:
    pair, call = fresh(name), LENGTH | MODES[mode]
    with counted() as count:
        for seed in (1, 2, 3):
            ids = prompts(name, seed=seed)
            assert_same(pair, ids, attention_mask=torch.ones_like(ids), **call)
        assert count == [1]
        for seed in (1, 2):
            ids = prompts(name, rows=1, seed=seed)
            mask = torch.ones_like(ids, dtype=torch.bool)
            assert_same(pair, None, input_ids=ids, attention_mask=mask, **call)
        assert count == [2]


def test_a_mask_that_stock_takes_from_the_tokens_is_taken_from_those_of_the_call() -> None:
    pair, ids = fresh("gpt2"), prompts("gpt2", rows=1)
    with counted() as count:
        for pad in (None, 2):
            for first in (3, 2, 3, 2):
                ids[0, 0] = first
                assert_same(pair, ids, pad_token_id=pad, eos_token_id=1, **LENGTH)
    assert count == [5], "without a token of padding there is one mask"


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_those_of_the_call(name: str) -> None:
    pair, ids = fresh(name), prompts(name)
    full, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[1, :4] = 0
    for mask in (full, padded, full, padded, full):
        assert_same(pair, ids, attention_mask=mask, **LENGTH)


def test_a_generation_config_of_the_call_is_looked_at() -> None:
    pair = fresh("t5-1.1")
    config = GenerationConfig(max_new_tokens=5)
    with counted() as count:
        for _ in range(2):
            assert_same(pair, prompts("t5-1.1"), generation_config=config)
        assert count == [1]
        config.num_beams = 2
        assert_same(pair, prompts("t5-1.1"), generation_config=config)
        assert count == [2]


def edit_generation_config(model: Any) -> None:
    model.generation_config.min_new_tokens = 5


def another_generation_config(model: Any) -> None:
    model.generation_config = GenerationConfig.from_dict(
        model.generation_config.to_dict() | {"repetition_penalty": 5.0}
    )


def edit_list_of_generation_config(model: Any) -> None:
    model.generation_config.eos_token_id.append(4)


def edit_config(model: Any) -> None:
    model.config.d_ff = 65  # no engine of before


def assign_method(model: Any) -> None:
    def lift(*args: Any, **kwargs: Any) -> Any:
        found = GenerationMixin._get_logits_processor(model, *args, **kwargs)
        found.append(lambda _, scores: scores.index_fill(1, torch.tensor([5]), 1e3))
        return found

    model._get_logits_processor = lift


CHANGES = (
    edit_generation_config,
    another_generation_config,
    edit_list_of_generation_config,
    edit_config,
    assign_method,
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_calls_is_seen(change: Callable[[Any], None]) -> None:
    pair, ids = fresh("t5-1.1"), prompts("t5-1.1")
    for model in (pair.stock, pair.fast):
        model.generation_config.eos_token_id = [1]
    with counted() as count:
        for _ in range(2):
            assert_same(pair, ids, **LENGTH)
        assert count == [1]
        for model in (pair.stock, pair.fast):
            change(model)
        assert_same(pair, ids, **LENGTH)
        assert_same(pair, ids, **LENGTH)
    assert change is not assign_method or count == [1]  # it is not for known calls at all


def test_a_method_that_is_replaced_for_all_models_is_called(monkeypatch: Any) -> None:
    pair, ids = fresh("t5-1.1"), prompts("t5-1.1")
    pair.fast.generate(ids, **LENGTH)
    pair.fast.generate(ids, **LENGTH)
    prepare = mock.Mock(side_effect=ValueError("mine"))
    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", prepare)
    with pytest.raises(ValueError, match="mine"):
        pair.fast.generate(ids, **LENGTH)


def test_what_stock_says_of_each_call_is_said_of_each() -> None:
    """A default length, by a warning; something about the config, by the library's logger."""
    pair, ids = fresh("t5-1.1"), prompts("t5-1.1")
    for _ in range(3):
        with pytest.warns(UserWarning, match="max_length"):
            pair.fast.generate(ids)
    said: list[logging.LogRecord] = []
    handler = mock.Mock(level=logging.NOTSET, handle=said.append)
    library = logging.getLogger("transformers")
    level = library.level
    library.addHandler(handler)
    library.setLevel(logging.WARNING)
    try:
        for _ in range(3):
            pair.fast.generate(ids, max_new_tokens=3, eos_token_id=-7)
    finally:
        library.removeHandler(handler)
        library.setLevel(level)
    assert len([record for record in said if "positive integers" in record.msg]) == 3


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_stock_are_raised_after_a_call_that_went_well(name: str) -> None:
    pair, ids = fresh(name), prompts(name)
    for _ in range(2):
        assert_same(pair, ids, **LENGTH)
    wrong = ids.clone()
    wrong[0, 0] = 10_000
    for call in (
        {"inputs": wrong, **LENGTH},
        {"inputs": ids, "max_new_token": 6},
        {"inputs": ids, "max_new_tokens": "six"},
        {"inputs": ids, "max_new_tokens": -1},
    ):
        errors = []
        for model in (pair.stock, pair.fast):
            with pytest.raises(Exception) as caught:
                model.generate(**call)
            errors.append(caught.value)
        assert type(errors[0]) is type(errors[1])


def test_calls_of_other_kinds_come_through_stock() -> None:
    pair, ids = fresh("t5-1.1"), prompts("t5-1.1")
    others: tuple[dict[str, Any], ...] = (
        {"logits_processor": []},
        {"streamer": None, "decoder_input_ids": ids[:, :2]},
        {"max_time": 1000.0},
        {"encoder_no_repeat_ngram_size": 2},
    )
    with counted() as count:
        for other in others:
            for seed in (1, 2):
                assert_same(pair, prompts("t5-1.1", seed=seed), **LENGTH, **other)
    assert count == [4], "only what a call's plain values say is noted, and not remembered"


def test_few_calls_are_remembered(monkeypatch: Any) -> None:
    monkeypatch.setattr(known, "_KEPT", 3)
    model: Any = fresh("t5-1.1").fast
    for new in range(1, 8):
        model.generate(prompts("t5-1.1"), max_new_tokens=new)
    assert len(model._engine.calls) == 3


def test_what_is_remembered_keeps_no_call_alive() -> None:
    model: Any = fresh("t5-1.1").fast
    for _ in range(2):
        model.generate(prompts("t5-1.1"), **LENGTH)
    (found,) = model._engine.calls.values()
    assert (found.call.decoder, found.call.hidden, found.call.mask, found.call.cache) == (None,) * 4


def add_hook(model: Any) -> None:
    def forward(module: Any, arguments: Any, output: Any) -> Any:
        return output * 0

    model.decoder.block[0].layer[2].DenseReluDense.wo.register_forward_hook(forward)


def replace_parameter(model: Any) -> None:
    old = model.encoder.block[0].layer[0].SelfAttention.q
    old.weight = torch.nn.Parameter(-2 * old.weight.detach())


def edit_data(model: Any) -> None:
    old = model.decoder.block[1].layer[0].SelfAttention.q
    old.weight.data = -2 * old.weight.data


def edit_in_place(model: Any) -> None:
    with torch.no_grad():
        model.decoder.block[1].layer[0].SelfAttention.q.weight.mul_(-2)


@pytest.mark.parametrize("mode", ["greedy", "beams", "sample"])
@pytest.mark.parametrize("change", [add_hook, replace_parameter, edit_data, edit_in_place, None])
def test_a_gpu_computes_before_the_look_at_the_weights(
    change: Callable[[Any], None] | None, mode: str
) -> None:
    pair, ids = fresh("t5-1.1"), prompts("t5-1.1")
    pair.fast.engine_options = {"prepack": 0}
    call, looks = LENGTH | MODES[mode], []
    choose, same = Loop._choose, Glance.same

    def chooses(self: Any) -> Any:
        looks.append("launch")
        return choose(self)

    def looked(self: Any, root: Any) -> bool:
        looks.append("look")
        return same(self, root)

    with gpu_paths(), counted() as count:
        for _ in range(2):
            assert_same(pair, ids, **call)
        assert count == [1]
        with (
            mock.patch.object(Loop, "_choose", chooses),
            mock.patch.object(Glance, "same", looked),
        ):
            assert_same(pair, ids, **call)
        ahead = mode != "sample"
        assert looks[:2] == (["launch", "look"] if ahead else ["look", "launch"])
        if change is not None:
            for model in (pair.stock, pair.fast):
                change(model)
            for _ in range(2):
                assert_same(pair, ids, **call)


def test_an_error_before_the_look_is_that_of_the_model_as_it_is() -> None:
    """Whatever fails in a launch that must not count is forgotten with it."""
    pair, ids = fresh("t5-1.1"), prompts("t5-1.1")
    pair.fast.engine_options = {"prepack": 0}
    choose, left = Loop._choose, [1]

    def fails(self: Any) -> Any:
        if left:
            left.pop()
            raise RuntimeError("launch")
        return choose(self)

    with gpu_paths():
        for _ in range(2):
            assert_same(pair, ids, **LENGTH)
        with mock.patch.object(Loop, "_choose", fails):
            with pytest.raises(RuntimeError, match="launch"):
                pair.fast.generate(ids, **LENGTH)
            left.append(1)
            for model in (pair.stock, pair.fast):
                replace_parameter(model)
            assert_same(pair, ids, **LENGTH)
    assert not left
