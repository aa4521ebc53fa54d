"""A calibrated encoder: it computes in integers, near the stock model, and follows its weights."""

from __future__ import annotations

import copy
import functools
import pickle
import platform
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fastgen import FastBertModel, FastGPT2LMHeadModel, FastT5EncoderModel
from fastgen.calibration import FILE_NAME, Calibration, Range
from fastgen.errors import FallbackWarning
from fastgen.quantize import calibrate, ranges
from tests.configs import build_pair
from tests.models.test_bert import LENGTHS, build, call

INTEGERS = "com.microsoft.MatMulIntegerToFloat"


def fresh(head: str = "Model") -> tuple[Any, Any]:
    """The stock model, and a Fast one to work on."""
    pair = build(head)
    return pair.stock, copy.deepcopy(pair.fast)


def batches(head: str = "Model", count: int = 2) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(count):
        shape = call(head)["input_ids"].shape
        ids = torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))
        found.append({"input_ids": ids})
    return found


@functools.cache
def calibration_of(head: str, **options: Any) -> Calibration:
    return calibrate(fresh(head)[1], batches(head), **options)


def calibrated(head: str = "Model", **options: Any) -> tuple[Any, Any]:
    stock, fast = fresh(head)
    fast.calibration = calibration_of(head, **options)
    return stock, fast


def encoder(model: Any) -> FastBertModel:
    return model if isinstance(model, FastBertModel) else model.bert


def products(model: Any) -> dict[str, int]:
    """How many products of each kind the encoder's graph has."""
    kinds = encoder(model)._engine.engine.graph.operators()
    return {kind: kinds.get(kind, 0) for kind in (INTEGERS, "com.microsoft.FusedMatMul")}


@torch.no_grad()
def first(model: Any, **arguments: Any) -> torch.Tensor:
    return model(**arguments)[0]


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Of all numbers, beside their spread."""
    return float((found - right).square().mean().sqrt() / right.std())


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForMultipleChoice"])
@pytest.mark.parametrize("padding", [None, "right", "holes"])
@torch.no_grad()
def test_it_computes_in_integers_and_near_the_stock_model(head: str, padding: str | None) -> None:
    stock, fast = calibrated(head)
    given = call(head, padding)
    right, found = (first(model, **given) for model in (stock, fast))
    if head == "Model" and padding:
        kept = given["attention_mask"].bool()
        right, found = right[kept], found[kept]
    assert 1e-5 < error(found, right) < 0.1
    assert fast.refusal(**given) is None
    calibrated_by = "engine, 8-bit integers by calibration (percentile 99.99)"
    assert str(fast.explain(**given)) == calibrated_by
    assert products(fast) == {INTEGERS: 18, "com.microsoft.FusedMatMul": 0}


@pytest.mark.parametrize("method", ["max", "entropy", "mse"])
def test_each_method(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ranges._BINS, "entropy", 192)  # else 5 s
    pair = build("Model", "tanh")
    stock, fast = pair.stock, copy.deepcopy(pair.fast)
    assert calibrate(fast, batches(), method) is fast.calibration
    assert fast.calibration.method == method
    assert error(*(first(model, **call("Model", None)) for model in (fast, stock))) < 0.12


def test_packed_rows_compute_what_rows_with_padding_do() -> None:
    fast = calibrated()[1]
    packed = first(fast, **call("Model"))
    fast.engine_options = {"skip_padding": False}
    padded = first(fast, **call("Model"))
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(packed[row, :length], padded[row, :length], rtol=0, atol=1e-5)


def test_hidden_states_and_the_pooler_are_of_integers_too() -> None:
    stock, fast = calibrated()
    with torch.no_grad():
        outputs = [
            model(**call("Model", None), output_hidden_states=True) for model in (fast, stock)
        ]
    for found, right in zip(*(output.hidden_states for output in outputs), strict=True):
        assert error(found, right) < 0.06
    assert 0 < error(*(output.pooler_output for output in outputs)) < 0.1
    assert fast._engine.pooling.graph.operators()[INTEGERS] == 1


def test_layers_without_a_range_keep_float32() -> None:
    stock, fast = calibrated()
    fast.calibration = fast.calibration.without("*.query", "*.output.dense", "pooler.dense")
    assert error(*(first(model, **call("Model", None)) for model in (fast, stock))) < 0.06
    assert products(fast) == {INTEGERS: 9, "com.microsoft.FusedMatMul": 9}
    assert INTEGERS not in fast._engine.pooling.graph.operators()


def test_no_calibration_is_float32_again() -> None:
    stock, fast = calibrated()
    first(fast, **call("Model"))
    fast.calibration = None
    right, found = (first(model, **call("Model", None)) for model in (stock, fast))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=2e-5)


def test_padding_has_no_part_in_ranges() -> None:
    given = call("Model", "right")
    ranges = []
    for garbage in (3, 90):
        ids = given["input_ids"].masked_fill(given["attention_mask"] == 0, garbage)
        fast = fresh()[1]
        ranges.append(calibrate(fast, [given | {"input_ids": ids}], "max"))
    assert ranges[0].inputs.keys() == ranges[1].inputs.keys()
    for name, known in ranges[0].inputs.items():
        other = ranges[1].inputs[name]
        assert (known.low, known.high) == pytest.approx((other.low, other.high), abs=1e-5), name


@pytest.mark.parametrize("vnni", [True, False])
def test_processors_compute_the_same(vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are int8, or where such products overflow uint8: here none does, in ranges so wide
    that all integers are near their middle."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    right, fast = (calibrated()[1] for _ in range(2))
    wide = {name: Range(-60, 60) for name in fast.calibration.inputs}
    right.calibration = fast.calibration = Calibration(wide)
    found = first(fast, **call("Model", None))
    assert fast._engine.target.saturates is not vnni
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    torch.testing.assert_close(found, first(right, **call("Model", None)), rtol=0, atol=1e-5)
    assert not right._engine.target.saturates


EDITS = {
    "in place": lambda weight: weight.mul_(1.5),
    "through data": lambda weight: weight.data.mul_(1.5),
    "anew": lambda weight: setattr(weight, "data", weight.data * 1.5),
}


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_edits_of_weights_are_noticed(edit: str) -> None:
    stock, fast = calibrated()
    stock, given = copy.deepcopy(stock), call("Model", None)
    before = first(fast, **given)
    for model in (stock, fast):
        EDITS[edit](model.encoder.layer[1].attention.output.dense.weight)
    right, found = (first(model, **given) for model in (stock, fast))
    assert error(before, right) > 0.1
    assert error(found, right) < 0.06


def test_pickles_and_copies_keep_it() -> None:
    fast = calibrated()[1]
    right = first(fast, **call("Model"))
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast.to("cpu").float()):
        assert twin.calibration == fast.calibration
        torch.testing.assert_close(first(twin, **call("Model")), right, rtol=0, atol=0)
        assert products(twin)[INTEGERS] == 18


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_save_and_load(head: str, tmp_path: Path) -> None:
    fast = calibrated(head)[1]
    right = first(fast, **call(head))
    fast.save_pretrained(tmp_path)
    assert Calibration.load(tmp_path) == fast.calibration
    loaded = type(fast).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(first(loaded, **call(head)), right, rtol=0, atol=0)
    if head == "Model":
        loaded.calibration = None
        loaded.save_pretrained(tmp_path)
        assert not (tmp_path / FILE_NAME).exists()
        assert type(fast).from_pretrained(tmp_path).calibration is None


def test_a_calibration_serves_another_head() -> None:
    known = calibrated()[1].calibration
    stock, fast = fresh("ForSequenceClassification")
    fast.calibration = known
    assert encoder(fast).calibration == known
    assert (
        1e-5 < error(*(first(m, **call("ForSequenceClassification")) for m in (fast, stock))) < 0.06
    )


def test_in_the_engine_cache_ranges_are_part_of_the_key(tmp_path: Path) -> None:
    found = []
    for scale in (1, 2):
        fast = fresh()[1]
        fast.engine_options = {"cache_dir": tmp_path}
        names = build("Model").fast.encoder.named_modules()
        layers = [n for n, part in names if isinstance(part, torch.nn.Linear)]
        fast.calibration = Calibration({f"encoder.{n}": Range(-scale, scale) for n in layers})
        found.append(first(fast, **call("Model", None)))
    assert not found[0].equal(found[1])


def test_data_loaders_modes_and_warnings() -> None:
    fast = fresh()[1]
    fast.train()
    fast.encoder.layer[0].eval()
    modes = [part.training for part in fast.modules()]
    rows = [{"input_ids": row} for row in call("Model")["input_ids"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        found = calibrate(fast, DataLoader(rows, batch_size=2))
    assert [part.training for part in fast.modules()] == modes
    assert len(found.inputs) == 19 and not found.outputs
    assert not any(part._forward_pre_hooks for part in fast.modules())


def test_what_cannot_be_calibrated() -> None:
    stock, fast = fresh()
    with pytest.raises(ValueError, match="batches gave nothing"):
        calibrate(fast, [])
    with pytest.raises(ValueError, match="method='min': allowed are"):
        calibrate(fast, batches(), "min")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a batch is a tuple"):
        calibrate(fast, [(call("Model")["input_ids"],)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="BertModel has 0 Fast encoders"):
        calibrate(stock, batches())
    with pytest.raises(TypeError, match="calibration is a dict"):
        fast.calibration = {}
    assert fast.calibration is None
    decoder = copy.deepcopy(build_pair("gpt2").fast)
    assert isinstance(decoder, FastGPT2LMHeadModel)
    with pytest.raises(TypeError, match="has no encoder that could be calibrated"):
        decoder.calibration = Calibration({})


def test_other_encoders_take_it_too() -> None:
    pair = build_pair("t5-1.1")
    model = FastT5EncoderModel(copy.deepcopy(pair.stock.config)).eval()
    model.encoder.load_state_dict(pair.stock.encoder.state_dict())
    given = {"input_ids": torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(3))}
    right = first(model, **given)
    calibrate(model, [given])
    assert 1e-5 < error(first(model, **given), right) < 0.1
    assert model.encoder._engine.engine.graph.operators()[INTEGERS] == 14


def test_it_is_found_under_the_packages_name() -> None:
    import fastgen

    assert fastgen.quantize.calibrate is calibrate
