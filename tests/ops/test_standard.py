"""Each operation of the vocabulary against torch: computed on the CPU in ONNX Runtime's operators
and in standard ones, lowered for the GPU."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxscript import nn
from transformers.activations import ACT2FN

from fastgen.blockwise import Format
from fastgen.engines.onnxruntime import OnnxRuntimeEngine
from fastgen.errors import UnsupportedConfigError
from fastgen.graphs import graph as graphs
from fastgen.graphs.graph import Graph, TensorSpec
from fastgen.ops.standard import Ops
from fastgen.ops.values import Bias, KVSlots
from fastgen.options import EngineOptions
from fastgen.target import Target, onnxruntime_cpu, onnxruntime_cuda, tensorrt
from tests.standard import cpu_target

CPU = onnxruntime_cpu()
STANDARD = cpu_target("float32")  # the lowering that TensorRT gets
CUDA = [onnxruntime_cuda(dtype) for dtype in ("float32", "float16", "bfloat16")]
Call = Callable[..., Any]  # (op, weights, **inputs) -> output or outputs by name
F = torch.nn.functional


class Weights(nn.Module):
    """A module that holds weights and nothing else."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(list(shape)))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(
    call: Call,
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    target: Target = CPU,
    held: Mapping[str, Format] = MappingProxyType({}),
) -> Graph:
    """The graph of one operation; floats take the target's dtype, all axes are free."""

    def spec(name: str, tensor: torch.Tensor) -> TensorSpec:
        dtype = target.dtype if tensor.is_floating_point() else str(tensor.dtype)[len("torch.") :]
        return TensorSpec(name, dtype, tuple(f"{name}_{i}" for i in range(tensor.ndim)))

    module = Weights({name: weight.shape for name, weight in weights.items()})

    def traced(op: Ops, **values: Any) -> Mapping[str, Any]:
        found = call(op, module, **values)
        return found if isinstance(found, Mapping) else {"y": found}

    types = {name: (target.dtype, tuple(weight.shape)) for name, weight in weights.items()}
    specs = [[spec(*item) for item in tensors.items()] for tensors in (inputs, outputs)]
    return graphs.build(module, target, types, traced, *specs, held)


def check(
    call: Call,
    inputs: Mapping[str, torch.Tensor],
    expected: torch.Tensor | Mapping[str, torch.Tensor],
    **weights: torch.Tensor,
) -> None:
    """The operation gives the expected values on the CPU, and a sound graph for the GPU."""
    outputs = expected if isinstance(expected, Mapping) else {"y": expected}
    weights = weights or {"unused": torch.zeros(1)}
    for target in (CPU, STANDARD):
        found = {name: torch.full_like(value, torch.nan) for name, value in outputs.items()}
        run(build(call, inputs, outputs, weights, target), {**inputs, **found}, weights, target)
        torch.testing.assert_close(found, dict(outputs), rtol=1e-5, atol=1e-5)
    for target in CUDA:
        assert_sound(build(call, inputs, outputs, weights, target))


def run(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    target: Target = CPU,
) -> None:
    OnnxRuntimeEngine(graph, target, weights, EngineOptions()).bind(tensors).run()


def assert_sound(graph: Graph) -> list[onnx.NodeProto]:
    """Every value is made before it is used, once; the nodes in order."""
    model = onnx.load_from_string(graph.onnx)
    known = {value.name for value in model.graph.input}
    known |= {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        assert {name for name in node.input if name} <= known, node.name
        made = {name for name in node.output if name}
        assert not made & known, node.name
        known |= made
    assert {value.name for value in model.graph.output} <= known
    return list(model.graph.node)


def names(graph: Graph) -> list[str]:
    return [node.op_type for node in assert_sound(graph)]


# Layers


def test_embedding() -> None:
    ids, weight = torch.tensor([[2, 0, 1], [4, 4, 3]]), random(5, 6)
    check(lambda op, w, ids: op.embedding(ids, w.table), {"ids": ids}, weight[ids], table=weight)


@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3])
def test_linear(scale: float) -> None:
    x, weight, bias = random(2, 3, 6), random(4, 6, seed=1), random(4, seed=2)
    expected = scale * x @ weight.T
    call: Call = lambda op, w, x: op.linear(x, w.weight, scale=scale)  # noqa: E731
    check(call, {"x": x}, expected, weight=weight)
    call = lambda op, w, x: op.linear(x, w.weight, w.bias, scale)  # noqa: E731
    check(call, {"x": x}, expected + bias, weight=weight, bias=bias)


def test_wide_linear() -> None:
    x, weight = random(2, 3, 6), random(4, 6, seed=1)
    check(lambda op, w, x: op.wide_linear(x, w.weight), {"x": x}, x @ weight.T, weight=weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(eps: float) -> None:
    x, weight = random(2, 3, 6), random(6, seed=1)
    expected = rms_norm(x, weight, eps)
    check(lambda op, w, x: op.rms_norm(x, w.weight, eps), {"x": x}, expected, weight=weight)


def test_add_rms_norm() -> None:
    x, y, weight = random(2, 3, 6), random(2, 3, 6, seed=2), random(6, seed=1)

    def call(op: Ops, w: Any, x: Any, y: Any) -> Mapping[str, Any]:
        total, normed = op.add_rms_norm(x, y, w.weight, 0.1)
        return {"total": total, "normed": normed}

    expected = {"total": x + y, "normed": rms_norm(x + y, weight, 0.1)}
    check(call, {"x": x, "y": y}, expected, weight=weight)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish"])
def test_activation(name: str) -> None:
    x = 3 * random(2, 3, 6)
    check(lambda op, w, x: op.activation(x, name), {"x": x}, ACT2FN[name](x))


def test_an_unknown_activation_is_refused_by_name() -> None:
    x = random(2, 3)
    with pytest.raises(UnsupportedConfigError, match=r"dense_act_fn='mish'.*relu.*swish"):
        check(lambda op, w, x: op.activation(x, "mish"), {"x": x}, x)


def test_multiply_and_add() -> None:
    x, y = random(2, 3, 6), random(2, 3, 6, seed=1)
    check(lambda op, w, a, b: op.multiply(a, b), {"a": x, "b": y}, x * y)
    check(lambda op, w, a, b: op.add(a, b), {"a": x, "b": y}, x + y)


# Attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[B, Q, H*D] queries over [B, H, K, D] keys and values."""
    heads = k.shape[1]
    split = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    y = F.scaled_dot_product_attention(split, k, v, attn_mask=bias, scale=1.0)
    return y.transpose(1, 2).flatten(2)


def test_attention() -> None:
    q, k, v = (random(2, n, 12, seed=i) for i, n in enumerate((4, 5, 5)))
    bias = random(2, 3, 4, 5, seed=3)
    heads = [x.unflatten(-1, (3, 4)).transpose(1, 2) for x in (k, v)]
    check(
        lambda op, w, q, k, v, bias: op.attention(q, k, v, bias, 3),
        {"q": q, "k": k, "v": v, "bias": bias},
        attend(q, *heads, bias),
    )


def test_attention_over_kv_buffers() -> None:
    q, k, v = random(2, 1, 12), random(2, 3, 5, 4, seed=1), random(2, 3, 5, 4, seed=2)
    inputs, expected = {"q": q, "k": k, "v": v}, attend(q, k, v, torch.zeros(1, 1, 1, 5))

    def call(op: Ops, w: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        return op.attention(q, k, v, op.mask_bias(mask), 3)

    check(call, inputs | {"mask": torch.ones(2, 5, dtype=torch.int64)}, expected)


def test_as_kv() -> None:
    x = random(2, 5, 12)
    expected = x.unflatten(-1, (3, 4)).transpose(1, 2).contiguous()
    check(lambda op, w, x: op.as_kv(x, 3, 4), {"x": x}, expected)


@pytest.mark.parametrize("target", [CPU, STANDARD], ids=["appends", "scatters"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("filled", [0, 2])
def test_cached_attention_appends_in_place(queries: int, filled: int, target: Target) -> None:
    """Attention reads the filled slots and the new ones, and leaves the rest alone; where it reads
    all, the bias hides the rest."""
    slots, length = 8, filled + queries
    q, k, v = (random(2, queries, 12, seed=i) for i in range(3))
    buffers = [random(2, 3, slots, 4, seed=i) for i in (5, 6)]
    positions = torch.arange(filled, length)[:, None]
    bias = torch.where(torch.arange(length) > positions, float("-inf"), 0.0)[None, None]
    expected = [buffer.clone() for buffer in buffers]
    for buffer, new in zip(expected, (k, v), strict=True):
        buffer[:, :, filled:length] = new.unflatten(-1, (3, 4)).transpose(1, 2)
    y = attend(q, *(buffer[:, :, :length] for buffer in expected), bias)

    def call(op: Ops, w: Any, q: Any, k: Any, v: Any, key: Any, value: Any, **rest: Any) -> Any:
        kv = KVSlots(key, value, rest["first_slot"])
        bias = Bias(rest["positions"], rest["slots"])
        y, key, value = op.cached_attention(q, k, v, kv, bias, 3)
        return {"y": y, "new_key": key, "new_value": value}

    inputs = {"q": q, "k": k, "v": v, "key": buffers[0], "value": buffers[1]}
    inputs |= {"positions": positions, "slots": torch.arange(slots)[None]}
    inputs |= {"first_slot": torch.tensor([filled], dtype=torch.int32)}
    if not target.appends_in_attention:
        inputs |= {"first_slot": torch.full((2,), filled)}
    outputs = {"y": torch.empty_like(y), "new_key": buffers[0], "new_value": buffers[1]}
    weights = {"unused": torch.zeros(1)}
    run(build(call, inputs, outputs, weights, target), inputs | outputs, weights, target)
    torch.testing.assert_close(outputs["y"], y, rtol=1e-5, atol=1e-5)
    for found, right in zip(buffers, expected, strict=True):
        torch.testing.assert_close(found, right)


# Lowering for a GPU


@pytest.mark.parametrize("target", CUDA, ids=[target.dtype for target in CUDA])
def test_a_gpu_scatters_keys_and_values_and_reads_what_was_scattered(target: Target) -> None:
    row = random(2, 1, 12)
    inputs = {"q": row, "k": row, "v": row, "key": random(2, 8, 12), "value": random(2, 8, 12)}
    inputs |= {"first_slot": torch.zeros(2, dtype=torch.int64)}
    inputs |= {"positions": torch.tensor([[7]]), "slots": torch.arange(8)[None]}

    def call(op: Ops, w: Any, q: Any, k: Any, v: Any, key: Any, value: Any, **rest: Any) -> Any:
        kv = KVSlots(key, value, rest["first_slot"])
        bias = Bias(rest["positions"], rest["slots"])
        y, key, value = op.cached_attention(q, k, v, kv, bias, 3)
        return {"y": y, "new_key": key, "new_value": value}

    outputs = {"y": row, "new_key": inputs["key"], "new_value": inputs["value"]}
    graph = build(call, inputs, outputs, {"unused": torch.zeros(1)}, target)
    nodes = assert_sound(graph)
    *scatters, attention = [node for node in nodes if "Scatter" in node.op_type] + nodes[-1:]
    assert [node.op_type for node in scatters] == ["TensorScatter", "TensorScatter"]
    assert attention.op_type == "MultiHeadAttention"
    assert list(attention.input[1:3]) == [node.output[0] for node in scatters]


def test_float16_keeps_a_wide_result_in_float32() -> None:
    """Beyond 65504 nothing may pass through float16."""
    x, weight = {"x": random(2, 3, 6)}, {"weight": random(4, 6)}
    call: Call = lambda op, w, x: op.cast(op.wide_linear(x, w.weight), x.dtype)  # noqa: E731
    outputs = {"y": random(2, 3, 4)}
    nodes = assert_sound(build(call, x, outputs, weight, onnxruntime_cuda("float16")))
    alpha = onnx.helper.get_node_attr_value(nodes[0], "alpha")
    assert [node.op_type for node in nodes] == ["FusedMatMul", "Cast", "Mul", "Cast"]
    assert alpha == np.float32(2.0**-8)
    for dtype in ("float32", "bfloat16"):
        assert names(build(call, x, outputs, weight, onnxruntime_cuda(dtype))) == ["FusedMatMul"]


def test_float16_clamps_products_and_activations() -> None:
    x = {"x": random(2, 3)}
    for call in (lambda op, w, x: op.multiply(x, x), lambda op, w, x: op.activation(x, "relu")):
        graph = build(
            call, x, {"y": x["x"]}, {"unused": torch.zeros(1)}, onnxruntime_cuda("float16")
        )
        assert names(graph)[-1] == "Clip"
        for dtype in ("float32", "bfloat16"):
            plain = build(
                call, x, {"y": x["x"]}, {"unused": torch.zeros(1)}, onnxruntime_cuda(dtype)
            )
            assert "Clip" not in names(plain)


# Lowering to standard operators


def made_by(graph: Graph) -> dict[str, onnx.NodeProto]:
    return {name: node for node in assert_sound(graph) for name in node.output}


@pytest.mark.parametrize("scale", [1.0, 192**-0.5])
def test_standard_float16_products_accumulate_in_float32(scale: float) -> None:
    """TensorRT sees it only in casts that are next to the Gemm: of the rows, weight and result."""
    x, weight, y = {"x": random(2, 3, 6)}, {"weight": random(4, 6)}, {"y": random(2, 3, 4)}
    call: Call = lambda op, w, x: op.linear(x, w.weight, scale=scale)  # noqa: E731
    nodes = made_by(build(call, x, y, weight, tensorrt("float16")))
    (gemm,) = [node for node in nodes.values() if node.op_type == "Gemm"]
    assert [nodes[name].op_type for name in gemm.input] == ["Cast", "Cast"]
    assert nodes[gemm.input[1]].input[0] == "weight"
    users = [node.op_type for node in nodes.values() if gemm.output[0] in node.input]
    assert users == ["Cast"]
    for dtype in ("float32", "bfloat16"):
        plain = build(call, x, y, weight, tensorrt(dtype))
        assert plain.operators()["Gemm"] == 1
        assert ("Cast" in plain.operators()) == (dtype == "bfloat16" and scale != 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_standard_scales_are_not_rounded(dtype: str) -> None:
    """Or all logits would be off by the same part; a power of two is exact in every dtype."""
    x, weight, y = {"x": random(2, 3, 6)}, {"weight": random(4, 6)}, {"y": random(2, 3, 4)}
    for scale, kind in ((192**-0.5, onnx.TensorProto.FLOAT), (2.0**-4, None)):
        call: Call = lambda op, w, x: op.linear(x, w.weight, scale=scale)  # noqa: B023, E731
        model = onnx.load_from_string(build(call, x, y, weight, tensorrt(dtype)).onnx)
        constants = {t.name: t for t in model.graph.initializer}
        (factor,) = [constants[n.input[1]] for n in model.graph.node if n.op_type == "Mul"]
        assert factor.data_type == (kind or getattr(onnx.TensorProto, dtype.upper()))
