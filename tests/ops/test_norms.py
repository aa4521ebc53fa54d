"""Biases and layer norms of the vocabulary against torch (see ``test_standard.py``)."""

from collections.abc import Mapping
from typing import Any

import pytest
from torch.nn.functional import layer_norm

from fastgen.models.layers import LayerNorm
from fastgen.ops.standard import Ops
from fastgen.target import Target, onnxruntime_cuda, tensorrt
from tests.ops.test_standard import CUDA, Call, build, check, made_by, names, random


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_layer_norm(eps: float) -> None:
    x, weights = random(2, 3, 6), {"weight": random(6, seed=1), "bias": random(6, seed=2)}
    expected = layer_norm(x, (6,), **weights, eps=eps)
    call: Call = lambda op, w, x: op.layer_norm(x, w.weight, w.bias, eps)  # noqa: E731
    check(call, {"x": x}, expected, **weights)


def test_add_layer_norm() -> None:
    x, y = random(2, 3, 6), random(2, 3, 6, seed=3)
    weights = {"weight": random(6, seed=1), "bias": random(6, seed=2)}

    def call(op: Ops, w: Any, x: Any, y: Any) -> Mapping[str, Any]:
        total, normed = op.add_layer_norm(x, y, w.weight, w.bias, 0.1)
        return {"total": op.cast(total, x.dtype), "normed": normed}

    expected = {"total": x + y, "normed": layer_norm(x + y, (6,), **weights, eps=0.1)}
    check(call, {"x": x, "y": y}, expected, **weights)


@pytest.mark.parametrize("delta", [False, True], ids=["first", "further"])
def test_the_layer_norm_module_gives_the_sum_and_its_norm(delta: bool) -> None:
    """As RMSNorm does: the residual as it came where there is nothing to add yet."""
    x, y = random(2, 3, 6), random(2, 3, 6, seed=3)
    weights = {"weight": random(6, seed=1), "bias": random(6, seed=2)}

    def call(op: Ops, w: Any, x: Any, y: Any) -> Mapping[str, Any]:
        module = LayerNorm(6, 0.1)
        module.weight, module.bias = w.weight, w.bias
        total, normed = module(op, x, y if delta else None)
        assert delta or total is x
        total = op.cast(total if delta else op.add(x, y), x.dtype)
        return {"total": total, "normed": normed}

    expected = {"total": x + y}
    expected["normed"] = layer_norm(x + y if delta else x, (6,), **weights, eps=0.1)
    check(call, {"x": x, "y": y}, expected, **weights)


X, WEIGHTS = random(2, 3, 6), {"weight": random(6, seed=1), "bias": random(6, seed=2)}


@pytest.mark.parametrize("target", [*CUDA, tensorrt("float16")], ids=str)
def test_norms_of_another_dtype_than_their_weights_are_computed_in_float32(target: Target) -> None:
    """As where the residual stream is float32; weights of that dtype need no cast on a GPU."""

    def call(op: Ops, w: Any, x: Any, y: Any) -> Mapping[str, Any]:
        total, normed = op.add_layer_norm(x, y, w.weight, w.bias, 1e-5)
        return {"total": op.cast(total, x.dtype), "normed": normed}

    graph = build(call, {"x": X, "y": X}, {"total": X, "normed": X}, WEIGHTS, target)
    if target.contrib and target.residual_dtype == target.dtype:
        assert names(graph) == ["SkipLayerNormalization"]
        return
    nodes = made_by(graph)
    (norm,) = {n.name: n for n in nodes.values() if n.op_type == "LayerNormalization"}.values()
    assert [nodes[name].op_type for name in norm.input] == ["Add", "Cast", "Cast"]
    assert [nodes[name].op_type for name in nodes[norm.input[0]].input] == ["Cast", "Cast"]


def test_a_bias_is_added_within_the_standard_product() -> None:
    """In float16 as in float32, whose casts TensorRT wants next to the Gemm."""
    weights = {"weight": random(4, 6), "bias": random(4)}
    call: Call = lambda op, w, x: op.linear(x, w.weight, w.bias)  # noqa: E731
    y = {"y": random(2, 3, 4)}
    nodes = made_by(build(call, {"x": X}, y, weights, tensorrt("float16")))
    (gemm,) = [node for node in nodes.values() if node.op_type == "Gemm"]
    assert [nodes[name].op_type for name in gemm.input] == ["Cast", "Cast", "Cast"]
    graph = build(call, {"x": X}, y, weights, onnxruntime_cuda("bfloat16"))
    assert names(graph) == ["FusedMatMul", "Add"]


@pytest.mark.parametrize("width", [4096, 4104])
def test_wide_rows_are_added_and_normed_apart(width: int) -> None:
    """Where ONNX Runtime's one kernel would read beside them."""
    weights = {"weight": random(width), "bias": random(width, seed=1)}
    call: Call = lambda op, w, x: op.add_layer_norm(x, x, w.weight, w.bias, 1e-5)[1]  # noqa: E731
    graph = build(call, {"x": random(1, 2, width)}, {"y": random(1, 2, width)}, weights, CUDA[0])
    assert ("SkipLayerNormalization" in names(graph)) == (width == 4096)
