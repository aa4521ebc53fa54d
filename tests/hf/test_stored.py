"""Weights of fewer bits on disk: made once, right after every start, never another model's."""

import copy
import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fastgen.blockwise import Format
from fastgen.engine_cache import EngineCache
from fastgen.engines import NoEngine
from fastgen.errors import WeightsGoneError
from fastgen.hf import quantised, stored
from fastgen.hf.quantised import Weights
from fastgen.hf.stored import recall
from tests.configs import build_pair, prompts
from tests.helpers import logits

FORMS = [
    Format("int8", 32),
    Format("int4", 64),
    Format("int8", 32, transposed=True),
    Format("fp8", 0),
]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parameters that were quantised."""
    names: list[str] = []

    def noted(parameter: torch.Tensor, name: str, form: Format) -> Any:
        names.append(name)
        return blocks_of(parameter, name, form)

    blocks_of = quantised.blocks_of
    for home in (quantised, stored):
        monkeypatch.setattr(home, "blocks_of", noted)
    return names


def started(name: str, folder: Path, kind: str = "int8", **options: Any) -> Any:
    """A model of its own, as a new process would have it, that no engine was made for yet."""
    model = copy.deepcopy(build_pair(name).fast)
    model.engine_options = {"weights": kind, "cache_dir": str(folder), **options}
    return model


def weights_in(folder: Path) -> list[Path]:
    entries = EngineCache(folder).entries()
    return [folder / f"{e.fingerprint}.bin" for e in entries if e.title.endswith(" weights")]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_read_is_what_was_made(tmp_path: Path, form: Format, made: list[str]) -> None:
    tensors = {name: torch.randn(36, 70) for name in ("a", "b")}  # blocks that are not full
    names = [*form.names("a"), *form.names("b"), "a"]
    in_memory = Weights(tensors, {})
    expected = {name: in_memory[name].clone() for name in names}
    in_memory.made.clear()
    made.clear()
    for _ in range(2):
        weights = Weights(dict(tensors), {})
        recall(weights, names, EngineCache(tmp_path), "int weights")
        for name in names:
            assert weights[name].dtype == expected[name].dtype
            found, wanted = (t[name].view(torch.uint8) for t in (weights, expected))
            assert torch.equal(found, wanted), name
    assert made == ["a", "b"]
    (path,) = weights_in(tmp_path)
    with safe_open(path, "pt") as file:
        assert {*file.keys()} == {*names} - {"a"}


@pytest.mark.parametrize(("name", "kind"), [("t5-1.0", "int8"), ("gpt2", "int4"), ("bart", "int8")])
def test_a_second_start_makes_nothing(
    tmp_path: Path, name: str, kind: str, made: list[str]
) -> None:
    ids = prompts(name)

    def tokens(model: Any) -> torch.Tensor:
        assert str(model.explain(max_new_tokens=9)) == f"fast loop, {kind} weights"
        return model.generate(ids, max_new_tokens=9, min_new_tokens=9)

    first = tokens(started(name, tmp_path, kind))
    assert made and weights_in(tmp_path)
    made.clear()
    stat = [path.stat().st_ino for path in weights_in(tmp_path)]
    for keep in (True, False):
        again = started(name, tmp_path, kind, keep_torch_weights=keep)
        assert torch.equal(tokens(again), first)
    assert not made and [path.stat().st_ino for path in weights_in(tmp_path)] == stat


def edit_an_entry(model: Any) -> None:
    model.lm_head.weight.data[3, 5] += 0.125


def swap_two_rows(model: Any) -> None:
    weight = model.encoder.block[0].layer[0].SelfAttention.k.weight
    weight.data[:2] = weight.data[:2].flip(0).clone()


def swap_layers(model: Any) -> None:
    blocks = model.decoder.block
    one, other = (blocks[i].layer[2].DenseReluDense.wo for i in (0, 1))
    one.weight, other.weight = other.weight, one.weight


@pytest.mark.parametrize("edit", [edit_an_entry, swap_two_rows, swap_layers])
def test_other_numbers_are_other_files(tmp_path: Path, edit: Callable[[Any], None]) -> None:
    before = logits(started("t5-1.1", tmp_path))
    model, other = (started("t5-1.1", tmp_path, disk_cache=disk) for disk in (True, False))
    for each in (model, other):
        edit(each)
    found = logits(model)
    assert torch.equal(found, logits(other)) and not torch.equal(found, before)
    assert torch.equal(logits(started("t5-1.1", tmp_path)), before)


def test_edits_under_an_engine_stay_off_the_disk(tmp_path: Path) -> None:
    model = started("t5-1.1", tmp_path)
    before, files = logits(model), weights_in(tmp_path)
    for edit in (edit_an_entry, lambda m: m.lm_head.weight.detach().mul_(2)):
        edit(model)
        assert not torch.equal(logits(model), before)
    assert sorted(weights_in(tmp_path)) == sorted(files)


def test_a_file_that_goes_while_models_run(tmp_path: Path, made: list[str]) -> None:
    first, second = started("t5-1.1", tmp_path), started("t5-1.1", tmp_path)
    before = logits(first)
    assert torch.equal(logits(second), before)
    made.clear()
    EngineCache(tmp_path).prune(max_bytes=0)
    shutil.rmtree(tmp_path)
    assert torch.equal(logits(second), before) and not made
    assert torch.equal(logits(started("t5-1.1", tmp_path)), before) and made


def test_a_file_that_goes_as_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    before = logits(started("t5-1.1", tmp_path))
    monkeypatch.setattr(stored, "safe_open", gone)
    assert torch.equal(logits(started("t5-1.1", tmp_path)), before)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stored, "_header", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        found = logits(started("t5-1.1", tmp_path))
    assert weights_in(tmp_path) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(started("t5-1.1", tmp_path, disk_cache=False)), found)


def test_an_infinity_leaves_nothing(tmp_path: Path) -> None:
    weights = Weights({"w": torch.full((4, 32), torch.inf)}, {})
    with pytest.raises(NoEngine, match="w: a weight with an infinity"):
        recall(weights, Format("int8", 32).names("w"), EngineCache(tmp_path), "weights")
    assert weights_in(tmp_path) == [] and weights.made == {}


def test_another_way_to_round_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    weights, names = {"w": torch.randn(4, 32)}, Format("int8", 32).names("w")
    recall(Weights(weights, {}), names, EngineCache(tmp_path), "weights")
    monkeypatch.setattr(stored, "_sources_digest", lambda: "another")
    recall(Weights(weights, {}), names, EngineCache(tmp_path), "weights")
    assert made == ["w", "w"]


def test_weights_that_are_gone_are_not_looked_for(tmp_path: Path) -> None:
    model = started("t5-1.1", tmp_path, keep_torch_weights=False)
    logits(model)
    with pytest.raises(WeightsGoneError):
        model.generate(
            torch.ones(1, 4, dtype=torch.long),
            output_hidden_states=True,
            return_dict_in_generate=True,
        )


def test_the_record_names_no_place(tmp_path: Path) -> None:
    logits(started("t5-1.1", tmp_path))
    for path in weights_in(tmp_path):
        record = json.loads(path.with_suffix(".json").read_text())
        assert str(tmp_path) not in json.dumps(record["key"])


def test_a_copy_of_an_edited_model_leaves_its_weights(tmp_path: Path) -> None:
    model, ids = started("gpt2", tmp_path), prompts("gpt2")
    model.generate(ids, max_new_tokens=2)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(2)
    model.generate(ids, max_new_tokens=2)
    before = len(weights_in(tmp_path))
    copy.deepcopy(model).generate(ids, max_new_tokens=2)
    assert len(weights_in(tmp_path)) > before
