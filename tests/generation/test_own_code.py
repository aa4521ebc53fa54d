"""Code of the program's own, which the HF loop calls for every token, is called here too."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from tests.configs import build_pair, prompts

NAME = "t5-1.1"


def lift(output: Any) -> Any:
    output.logits[..., 5] += 100
    return output


def subclass_forward(model: Any) -> None:
    class Mine(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return lift(super().forward(*args, **kwargs))

    model.__class__ = Mine


def assign_forward(model: Any) -> None:
    forward = model.forward
    model.forward = lambda *args, **kwargs: lift(forward(*args, **kwargs))


def subclass_inputs(model: Any) -> None:
    class Mine(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = super().prepare_inputs_for_generation(ids, *args, **kwargs)
            inputs["decoder_input_ids"] = inputs["decoder_input_ids"].clamp(max=7)
            return inputs

    model.__class__ = Mine


def assign_update(model: Any) -> None:
    update = model._update_model_kwargs_for_generation

    def mine(self: Any, outputs: Any, kwargs: Any, *args: Any, **options: Any) -> Any:
        return update(lift(outputs), kwargs, *args, **options)

    model._update_model_kwargs_for_generation = types.MethodType(mine, model)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "change", [subclass_forward, assign_forward, subclass_inputs, assign_update]
)
def test_tokens_are_those_of_the_own_code(change: Callable[[Any], None], beams: int) -> None:
    pair = copy.deepcopy(build_pair(NAME))
    call: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 6}
    plain = pair.fast.generate(prompts(NAME), **call)
    for model in (pair.stock, pair.fast):
        change(model)
    expected = pair.stock.generate(prompts(NAME), **call)
    if change is not assign_update:
        assert not torch.equal(plain, expected)
    assert pair.fast.generate(prompts(NAME), **call).tolist() == expected.tolist()
    assert "the program's own" in str(pair.fast.explain(input_ids=prompts(NAME), **call))


def test_generate_without_its_decorator() -> None:
    pair = build_pair(NAME)
    assert inspect.signature(pair.fast.generate) == inspect.signature(pair.stock.generate)
    expected = pair.stock.generate(prompts(NAME), max_new_tokens=4)
    found = pair.fast.generate.__wrapped__(pair.fast, prompts(NAME), max_new_tokens=4)
    assert found.tolist() == expected.tolist()
    assert type(pair.fast).generate is not GenerationMixin.generate
