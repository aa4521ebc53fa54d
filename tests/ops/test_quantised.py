"""Products by weights of fewer bits against torch's by the weights that they stand for."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastgen.blockwise import Format, blocks_of, dequantise, quantise
from fastgen.ops.standard import Ops
from fastgen.target import Target, onnxruntime_cpu, onnxruntime_cuda
from tests.ops.test_standard import Call, assert_sound, build, random, run
from tests.quantised import rounded
from tests.standard import cpu_target

CPU = onnxruntime_cpu()
STANDARD = cpu_target("float32")
#: Kinds and groups that the CPU's kernels take.
FORMS = [("int8", 128), ("int8", 32), ("int4", 64), ("int4", 32)]


def quantised(target: Target, kind: str, group: int) -> Target:
    return replace(target, weights=kind, group=group)  # type: ignore[arg-type]


def given(weight: torch.Tensor, form: Format) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What an engine is given in place of the parameter "weight", and the weight [N, K] it is."""
    whole = weight.T if form.transposed else weight
    blocks = quantise(whole, form.kind, form.group)
    names = form.names("weight")
    stands_for = dequantise(blocks, tuple(whole.shape), torch.float32)  # type: ignore[arg-type]
    return {names[0]: blocks.values, names[1]: blocks.scales}, stands_for


def compute(
    call: Call, x: torch.Tensor, y: torch.Tensor, target: Target, given: Any, **parameters: Any
) -> torch.Tensor:
    graph = build(call, {"x": x}, {"y": y}, parameters, target)
    assert "weight" not in graph.parameters
    found = torch.full_like(y, torch.nan)
    run(graph, {"x": x, "y": found}, given | parameters, target)
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("inputs", [256, 200, 24])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kind", "group"), FORMS)
def test_linear(kind: str, group: int, transposed: bool, inputs: int) -> None:
    form = Format(kind, group, transposed)  # type: ignore[arg-type]
    weight, bias = random(40, inputs, seed=1), random(40, seed=2)
    weight = weight.T.contiguous() if transposed else weight
    weights, whole = given(weight, form)

    def call(op: Ops, w: Any, x: Any) -> Any:
        return op.linear(x, w.weight, w.bias, 0.3, transposed)

    for rows in (1, 7):
        x = random(2, rows, inputs)
        exact = 0.3 * x @ whole.T + bias
        parts = {"weight": weight, "bias": bias}
        found = compute(call, x, exact, quantised(STANDARD, kind, group), weights, **parts)
        close(found, exact)
        found = compute(call, x, exact, quantised(CPU, kind, group), weights, **parts)
        close(found, rounded(0.3 * x, group) @ whole.T + bias)


#: What a checkpoint may have: values around a middle or not, and the halves that a CPU takes.
HELD = [
    Format("int4", 32),
    Format("int4", 32, zeros=True),
    Format("int8", 32, zeros=True),
    Format("int8", 32, zeros=True, halves=True),
]


def of_a_checkpoint(form: Format, inputs: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As ``given``, of a weight [40, inputs] with a scale and a zero of each row."""
    levels, generator = 16 if form.kind == "int4" else 256, torch.Generator().manual_seed(inputs)
    steps = torch.randint(levels, (40, inputs), generator=generator).byte()
    scales = torch.rand(40, 1, generator=generator) / levels
    zeros = torch.randint(levels, (40, 1), generator=generator).byte() if form.zeros else None
    blocks = blocks_of(steps, scales, zeros, form)
    whole = (steps.float() - (levels // 2 if zeros is None else zeros)) * scales
    return {name: blocks.part(i) for i, name in enumerate(form.names("weight"))}, whole


@pytest.mark.parametrize("inputs", [256, 200, 24])
@pytest.mark.parametrize("form", HELD)
def test_linear_of_a_checkpoints_own(form: Format, inputs: int) -> None:
    """Values of a checkpoint are multiplied as they are, unless fewer bits are asked for, too; the
    other weights of the graph are what the Target says."""
    weights, whole = of_a_checkpoint(form, inputs)
    bias, other = random(40, seed=2), random(12, 40, seed=3)

    def call(op: Ops, w: Any, x: Any) -> Any:
        return op.linear(op.linear(x, w.weight, w.bias, 0.3), w.other)

    parts = {"weight": torch.empty(40, inputs), "bias": bias, "other": other}
    form8 = Format("int8", 128)
    made = quantise(other, "int8", 128)
    asked = {n: made.part(i) for i, n in enumerate(form8.names("other"))}
    for rows in (1, 7):
        x = random(2, rows, inputs)
        exact = (0.3 * x @ whole.T + bias) @ other.T
        for target in (CPU, STANDARD):
            if target is STANDARD and form.halves:
                continue
            target = replace(target, held=True)
            graph = build(call, {"x": x}, {"y": exact}, parts, target, {"weight": form})
            assert {*graph.parameters} == {"bias", "other", *weights}
            found = torch.full_like(exact, torch.nan)
            run(graph, {"x": x, "y": found}, weights | {"bias": bias, "other": other}, target)
            close(found, exact)
        if form.halves:
            continue
        target = replace(CPU, held=True, weights="int8", group=128)
        graph = build(call, {"x": x}, {"y": exact}, parts, target, {"weight": form})
        found = torch.full_like(exact, torch.nan)
        run(graph, {"x": x, "y": found}, weights | {"bias": bias} | asked, target)
        inner = rounded(0.3 * x, form.group) @ whole.T + bias
        expected = rounded(inner, 128) @ dequantise(made, (12, 40), torch.float32).T
        assert (found - expected).norm() <= 1e-2 * expected.norm()
        assert (found - exact).norm() >= 1e-4 * exact.norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_linear_of_8_bit_floats(transposed: bool) -> None:
    x, weight = random(2, 3, 24), random(*(24, 40) if transposed else (40, 24), seed=1)
    weights, whole = given(weight, Format("fp8", 0, transposed))

    def call(op: Ops, w: Any, x: Any) -> Any:
        return op.linear(x, w.weight, transposed=transposed)

    y = x @ whole.T
    close(compute(call, x, y, quantised(STANDARD, "fp8", 0), weights, weight=weight), y)


def test_a_weight_read_twice_is_made_once_and_one_that_is_looked_up_stays() -> None:
    x, weight = random(1, 2, 32), random(32, 32, seed=1)
    form = Format("int8", 32)
    weights, whole = given(weight, form)

    def call(op: Ops, w: Any, x: Any) -> Any:
        first = op.linear(op.linear(x, w.weight), w.weight)
        return op.add(first, op.embedding(op.constant([[0, 1]], torch.int64), w.weight))

    graph = build(call, {"x": x}, {"y": x}, {"weight": weight}, quantised(STANDARD, "int8", 32))
    assert graph.parameters == ("weight", *form.names("weight"))
    found = torch.full_like(x, torch.nan)
    run(graph, {"x": x, "y": found}, weights | {"weight": weight}, STANDARD)
    close(found, x @ whole.T @ whole.T + weight[[0, 1]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_fp8_is_for_the_fused_kernels_alone(dtype: str) -> None:
    """ONNX Runtime's graph reads the weight as it is."""
    x, weight, target = random(1, 2, 64), random(32, 64), onnxruntime_cuda(dtype)

    def call(op: Ops, w: Any, x: Any) -> Any:
        return op.linear(x, w.weight)

    graph = build(call, {"x": x}, {}, {"weight": weight}, quantised(target, "fp8", 0))
    assert graph.parameters == ("weight",)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_graphs_for_a_gpu_are_sound(kind: str, dtype: str) -> None:
    x, weight = random(1, 2, 64), random(32, 64)

    def call(op: Ops, w: Any, x: Any) -> Any:
        return op.wide_linear(op.multiply(x, x), w.weight)

    target = quantised(onnxruntime_cuda(dtype), kind, 32)
    graph = build(call, {"x": x}, {}, {"weight": weight}, target)
    nodes = assert_sound(graph)
    assert [n.op_type for n in nodes if "MatMul" in n.op_type] == ["MatMulNBits"]
    assert not [a for n in nodes for a in n.attribute if a.name == "accuracy_level"]
    scaled = [n for n in nodes if n.op_type == "Mul"]  # x * x, and what keeps float16 in its range
    assert len(scaled) == 1 + 2 * (dtype == "float16")
