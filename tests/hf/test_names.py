"""What programs write down of a Fast model is the stock class; what pickles keep is its own."""

import copy
import functools
import io
import multiprocessing
import pickle
import re
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

import fastgen
from fastgen import FastT5, FastT5EncoderModel
from tests.configs import build_pair, prompts

MODELS = [name for name in fastgen.__all__ if name.startswith(("FastT5", "FastMT5", "FastUMT5"))]


class OwnT5(FastT5):
    """A program's own subclass."""


@functools.cache
def fast_model() -> FastT5:
    """Not that of other tests, whose recording hooks cannot be pickled."""
    shared = build_pair("t5-1.1").fast
    model = FastT5(copy.deepcopy(shared.config)).eval()
    model.load_state_dict(shared.state_dict())
    return model


def describe(model: Any) -> tuple[str, str, list[list[int]]]:
    """Runs in a process of its own, too."""
    tokens = model.generate(prompts("t5-1.1"), max_new_tokens=4).tolist()
    return type(model).__qualname__, model.__module__, tokens


@pytest.mark.parametrize("name", MODELS)
def test_a_class_is_written_down_as_the_stock_class(name: str) -> None:
    import transformers

    fast = getattr(fastgen, name)
    assert getattr(transformers, fast.__name__) in fast.__mro__
    assert issubclass(fast, getattr(transformers, fast.__name__))
    assert fast.__module__.startswith("fastgen.models.")
    assert getattr(fastgen, fast.__qualname__) is fast


def test_a_model_is_written_down_as_the_stock_model() -> None:
    pair = build_pair("t5-1.1")
    written = [(m.__module__, m.__class__.__name__) for m in (pair.fast, pair.stock)]
    assert written[0] == written[1]


def test_text_says_that_a_model_is_fast() -> None:
    pair = build_pair("t5-1.1")
    assert repr(FastT5) == "<class 'fastgen.models.t5.FastT5ForConditionalGeneration'>"
    assert repr(pair.fast).startswith("FastT5ForConditionalGeneration(\n  (shared): Embedding(")
    first, *others = repr(pair.stock).splitlines()
    stacks = re.sub(r"FastT5(Decoder)?Stack", "T5Stack", repr(pair.fast)).splitlines()
    assert stacks == ["Fast" + first, *others]


def copied_by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, copied_by_torch]
    + [lambda model, p=protocol: pickle.loads(pickle.dumps(model, p)) for protocol in (2, 4, 5)],
    ids=["copy", "deepcopy", "torch", "pickle 2", "pickle 4", "pickle 5"],
)
def test_a_copy_is_fast(copied: Any) -> None:
    fast = fast_model()
    again = copied(fast)
    assert type(again) is type(fast) is FastT5
    assert describe(again) == describe(fast)


def test_classes_are_pickled_by_reference() -> None:
    for kind in (FastT5, FastT5EncoderModel, OwnT5):
        assert pickle.loads(pickle.dumps(kind)) is kind


def describe_pickled(data: bytes) -> tuple[str, str, list[list[int]]]:
    return describe(pickle.loads(data))


def test_a_spawned_process_gets_a_fast_model() -> None:
    fast = fast_model()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(describe_pickled, (pickle.dumps(fast),)) == describe(fast)


def test_a_subclass_of_a_program_keeps_its_name() -> None:
    model = OwnT5(build_pair("t5-1.1").fast.config)
    assert (type(model).__name__, model.__module__) == ("OwnT5", __name__)
    assert repr(model).startswith("OwnT5(")
    assert isinstance(model, T5ForConditionalGeneration)
