"""Checkpoints as transformers loads them by the libraries themselves, where they are installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastgen
from tests.configs import build_stock, prompts
from tests.helpers import CLOSE, logits

Config = Callable[[], Any]


def torchao(name: str, **arguments: Any) -> Config:
    """A config of torchao's; values that are text name something of its."""

    def config() -> Any:
        library = pytest.importorskip("torchao.quantization")
        given = dict(arguments)
        if "granularity" in given:
            given["granularity"] = getattr(library, given["granularity"])(32)
        return transformers.TorchAoConfig(getattr(library, name)(**given))

    return config


def quanto() -> Any:
    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights="int8")


def bitsandbytes(**arguments: Any) -> Config:
    def config() -> Any:
        pytest.importorskip("bitsandbytes")
        return transformers.BitsAndBytesConfig(**arguments)

    return config


SERVED: dict[str, tuple[Config, str]] = {
    "torchao int8": (torchao("Int8WeightOnlyConfig"), "torchao's int8"),
    "torchao int4": (
        torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity="PerGroup"),
        "torchao's int4",
    ),
    "quanto int8": (quanto, "quanto's int8"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny T5."""
    where = tmp_path_factory.mktemp("checkpoint")
    build_stock("t5-1.1").save_pretrained(where)
    return where


def load(name: str, folder: Path, **arguments: Any) -> Any:
    library = fastgen if name.startswith("Fast") else transformers
    return getattr(library, f"{name}ForConditionalGeneration").from_pretrained(folder, **arguments)


@pytest.mark.parametrize("how", SERVED)
def test_the_engine_reads_the_very_same_values(how: str, folder: Path) -> None:
    make, words = SERVED[how]
    fast, stock = (load(n, folder, quantization_config=make()) for n in ("FastT5", "T5"))
    torch.testing.assert_close(logits(fast), logits(stock), **CLOSE)
    arguments = {"max_new_tokens": 20, "do_sample": False, "num_beams": 2}
    assert str(fast.explain(**arguments)) == f"fast loop, {words} weights"
    ids = prompts("t5-1.1", rows=3)
    assert torch.equal(fast.generate(ids, **arguments), stock.generate(ids, **arguments))


def test_a_saved_one_loads_again(folder: Path, tmp_path: Path) -> None:
    config = SERVED["torchao int8"][0]()
    first = load("FastT5", folder, quantization_config=config)
    before = logits(first)
    first.save_pretrained(tmp_path)
    fast, stock = load("FastT5", tmp_path), load("T5", tmp_path)
    assert str(fast.explain()) == "fast loop, torchao's int8 weights"
    assert torch.equal(logits(fast), before)
    torch.testing.assert_close(logits(stock), before, **CLOSE)
    light = load("FastT5", tmp_path, engine_options={"keep_torch_weights": False})
    for _ in range(2):
        assert torch.equal(logits(light), before)


REFUSED: dict[str, tuple[Config, str]] = {
    "torchao float8": (torchao("Float8WeightOnlyConfig"), "weights are torchao's Float8Tensor"),
    "torchao activations": (
        torchao("Int8DynamicActivationInt8WeightConfig"),
        "torchao rounds inputs to 8 bits",
    ),
    "bitsandbytes int8": (bitsandbytes(load_in_8bit=True), "bitsandbytes rounds inputs to float16"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_the_others_are_left_to_torch(how: str, folder: Path) -> None:
    make, reason = REFUSED[how]
    fast, stock = (load(n, folder, quantization_config=make()) for n in ("FastT5", "T5"))
    explained = fast.explain()
    assert explained.path == "torch" and reason in explained.reasons[0]
    ids = prompts("t5-1.1")
    with pytest.warns(fastgen.FallbackWarning, match=reason):
        found = fast.generate(ids, max_new_tokens=5)
    assert torch.equal(found, stock.generate(ids, max_new_tokens=5))
    if "rounds" in reason:
        fast.engine_options = {"weights": "int8"}
        assert "int8 weights" in str(fast.explain())
        exact, found = logits(stock), logits(fast)
        assert (found - exact).norm() <= 0.2 * exact.norm()
