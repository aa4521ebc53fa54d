"""A calibrated encoder in standard operators: what it computes, and what TensorRT makes of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch

from fastgen.calibration import Calibration
from fastgen.engines import choice
from fastgen.engines.recording import Recorder
from fastgen.engines.tensorrt_build import FLAVOURS, Build, build_plan
from fastgen.engines.weight_inputs import weights_as_inputs
from fastgen.graphs.graph import Graph
from fastgen.target import tensorrt
from tests.engines.test_standard_plans import Layer, compiled, trt  # noqa: F401
from tests.engines.test_tensorrt_build import OPTIONS
from tests.models.test_bert import build, call
from tests.quantize.test_calibrate import calibrated, calibration_of, error, first
from tests.standard import cpu_target

BOTH = {"attention": True, "residuals": True}
WAYS: dict[str, dict[str, Any]] = {
    **{"linear": {}, "attention": {"attention": True}, "residuals": {"residuals": True}},
    "all": BOTH,
}
#: A layer's operators that make integers of floats, and floats of integers (six of them weights).
COUNTS = {"linear": (4, 10), "attention": (8, 14), "residuals": (6, 12), "all": (10, 16)}


def graph_of(calibration: Calibration, dtype: str) -> Graph:
    """The encoder's graph for TensorRT; no weight is made."""
    model: Any = copy.deepcopy(build("Model").fast).to(getattr(torch, dtype))
    model.engine_options = OPTIONS
    recorder, target = Recorder(), tensorrt(dtype, "tensorrt-rtx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "backend", lambda name: recorder)
        model._build_engine(replace(target, calibration=calibration))
    return recorder.graphs["encoder"]


@pytest.mark.parametrize("way", WAYS)
def test_the_cpu_computes_what_is_asked_for_in_integers(way: str) -> None:
    stock, fast = calibrated(**WAYS[way])
    given = call("Model", "right")
    kept = given["attention_mask"].bool()
    assert 1e-5 < error(first(fast, **given)[kept], first(stock, **given)[kept]) < 0.06
    counts = fast._engine.engine.graph.operators()
    products = "com.microsoft.MatMulIntegerToFloat"
    assert counts[products] == 3 * (6 + 2 * ("attention" in WAYS[way]))
    assert counts.get("com.microsoft.MultiHeadAttention", 0) == 3 * ("attention" not in WAYS[way])
    assert counts.get("DequantizeLinear", 0) == 12 * ("residuals" in WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_standard_operators_compute_the_same(
    way: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, fast = calibrated("ForTokenClassification", **WAYS[way])
    fast = fast.to(getattr(torch, dtype))
    monkeypatch.setattr("fastgen.hf.building.choose_target", lambda *_: cpu_target(dtype))
    given = call("ForTokenClassification", None)
    found = first(fast, **given).float()
    assert not fast.bert._engine.target.contrib
    assert 1e-5 < error(found, first(stock, **given)) < 0.06


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_graph_is_sound(way: str, dtype: str) -> None:
    graph = graph_of(calibration_of("Model", **WAYS[way]), dtype)
    onnx.checker.check_model(onnx.load_from_string(weights_as_inputs(graph)), full_check=True)
    counts = graph.operators()
    rounded, back = counts["QuantizeLinear"], counts["DequantizeLinear"]
    assert (rounded / 3, back / 3) == COUNTS[way]
    assert not any(name.endswith("dense.weight") for name in graph.parameters)


@pytest.mark.parametrize("capability", [(8, 9), (12, 0)])
def test_tensorrt_builds_it(trt: Any, capability: tuple[int, int]) -> None:  # noqa: F811
    wanted = Build(FLAVOURS["tensorrt-rtx"], capability, OPTIONS, False)
    plan, _ = build_plan(
        graph_of(calibration_of("Model", **BOTH), "float16"), wanted, "encoder", b""
    )
    assert plan


def test_tensorrt_multiplies_integers(trt: Any, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    """Products read the weights' integers as they are."""
    graph = graph_of(calibration_of("Model"), "float16")
    layers: list[Layer] = compiled(trt, graph, caplog)
    values = [name for name in graph.parameters if name.endswith(":values")]
    assert len(values) == 18
    for name in values:
        kinds = {layer.kind for layer in layers if name in layer.inputs}
        assert kinds == {"gemm"}, name
