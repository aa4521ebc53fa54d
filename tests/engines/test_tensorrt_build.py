"""What TensorRT is given, and what it builds, on a machine that may have no GPU."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fastgen import EngineOptions
from fastgen.engines import choice, tensorrt_build
from fastgen.engines.recording import Recorder
from fastgen.engines.tensorrt_build import FLAVOURS, Build, Range
from fastgen.engines.weight_inputs import in_place, weights_as_inputs
from fastgen.errors import EngineError, MissingRuntimeError
from fastgen.execution.decoder import Decoder
from fastgen.graphs.graph import Graph
from fastgen.hf.module import EngineModule
from fastgen.target import Target, tensorrt
from tests.configs import VARIANTS, build_pair

RTX = FLAVOURS["tensorrt-rtx"]
OPTIONS = EngineOptions(disk_cache=False)
#: One variant of each graph structure is built; the networks of all are looked at.
BUILT = ("t5-1.1", "umt5")
GENERATIONS = ((8, 9), (12, 0))


@pytest.fixture(scope="module")
def trt() -> Any:
    try:
        return tensorrt_build.load(RTX)
    except MissingRuntimeError as error:
        pytest.skip(f"no TensorRT for RTX here: {error}")


def in_dtype(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """A copy in ``dtype``, with what ``from_pretrained`` keeps in float32."""
    model = copy.deepcopy(model)
    kept = model._keep_in_fp32_modules or [] if dtype == "float16" else []
    for name, parameter in model.named_parameters():
        if not set(kept) & set(name.split(".")):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def recorded(
    variant: str, dtype: str, target: Target | None = None
) -> tuple[dict[str, Graph], Any]:
    """All graphs of a model for TensorRT (or another Target) by name, and its Decoder."""
    model: Any = in_dtype(build_pair(variant).fast, dtype)
    model.engine_options = OPTIONS
    recorder, target = Recorder(), target or tensorrt(dtype, "tensorrt-rtx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "backend", lambda name: recorder)
        parts = [m for m in model.modules() if isinstance(m, EngineModule) and not m._waits]
        built = [part._build_engine(target) for part in parts]
    return recorder.graphs, next(engine for engine in built if isinstance(engine, Decoder))


def tensors(trt: Any, network: Any, kind: str) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Name, dtype and shape (-1: free) of a network's inputs or outputs."""
    for index in range(getattr(network, f"num_{kind}s")):
        tensor = getattr(network, f"get_{kind}")(index)
        yield tensor.name, tensor.dtype, tuple(tensor.shape)


def expected(trt: Any, specs: Any) -> dict[str, tuple[Any, tuple[int, ...]]]:
    dtypes = {
        "float32": trt.float32,
        "float16": trt.float16,
        "bfloat16": trt.bfloat16,
        "int64": trt.int64,
    }
    return {
        spec.name: (
            dtypes[spec.dtype],
            tuple(-1 if isinstance(axis, str) else axis for axis in spec.shape),
        )
        for spec in specs
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_networks_have_the_tensors_of_their_graphs(trt: Any, variant: str, dtype: str) -> None:
    graphs, _ = recorded(variant, dtype)
    assert len(graphs) == 3
    for name, graph in graphs.items():
        _, network = tensorrt_build.parse(trt, tensorrt_build.make_logger(trt), graph)
        inputs = {n: (kind, shape) for n, kind, shape in tensors(trt, network, "input")}
        weights = {n: inputs.pop(n) for n in graph.parameters}
        assert inputs == expected(trt, graph.inputs), name
        outputs = {n: (kind, shape) for n, kind, shape in tensors(trt, network, "output")}
        assert outputs == expected(trt, graph.outputs), name
        own = dict(in_dtype(build_pair(variant).fast, dtype).named_parameters())
        own |= dict(in_dtype(build_pair(variant).fast, dtype).get_encoder().named_parameters())
        for parameter, (kind, shape) in weights.items():
            if parameter in own:  # a tied parameter has one name there, and several here
                assert shape == tuple(own[parameter].shape)
                assert kind == getattr(trt, str(own[parameter].dtype).removeprefix("torch."))


@pytest.mark.parametrize("variant", VARIANTS)
def test_kv_buffers_are_updated_in_place(trt: Any, variant: str) -> None:
    graphs, decoder = recorded(variant, "float16")
    graph = next(g for name, g in graphs.items() if name.startswith("decoder"))
    _, network = tensorrt_build.parse(trt, tensorrt_build.make_logger(trt), graph)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    updates = [layer for layer in layers if "CACHE" in layer.type.name]
    pairs = {layer.get_output(0).name: layer.get_input(0).name for layer in updates}
    shape = decoder.shape
    wanted = zip(shape.kv_names("present"), shape.kv_names("self"), strict=True)
    assert pairs == dict(wanted) == in_place(graph)
    assert not any(in_place(g) for name, g in graphs.items() if not name.startswith("decoder"))


def test_profiles_hold_every_bucket_that_options_allow(trt: Any) -> None:
    graphs, decoder = recorded("t5-1.1", "float16")
    graph = next(g for name, g in graphs.items() if name.startswith("decoder"))
    builder, _ = tensorrt_build.parse(trt, tensorrt_build.make_logger(trt), graph)
    step, prefill = (
        tensorrt_build.make_profile(builder, graph, ranges)
        for ranges in tensorrt_build.profiles(graph, OPTIONS)
    )
    slots = decoder.slots_for(1)
    low, best, high = (tuple(shape) for shape in step.get_shape("slot_mask"))
    assert (low, best, high) == ((1, 1, 1, slots), (1, 1, 1, slots), (64, 1, 1, slots))
    assert tuple(prefill.get_shape("input_ids")[2]) == (OPTIONS.max_batch, slots)
    for profile in (step, prefill):
        low, _, high = (tuple(shape) for shape in profile.get_shape("cross_key.0"))
        assert low[2] <= decoder.sources_for(1)
        assert decoder.sources_for(OPTIONS.max_source_tokens) <= high[2]
        kv = [tuple(shape) for shape in profile.get_shape("self_key.0")]
        assert {shape[2] for shape in kv} == {slots}
    encoder = tensorrt_build.profiles(graphs["encoder"], OPTIONS)
    assert encoder == [{"B": Range(1, 1, 64), "S": Range(1, 128, 1024)}]


@pytest.mark.parametrize("generation", GENERATIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", BUILT)
def test_plans_build_for_a_gpu_that_is_not_here(
    trt: Any, variant: str, dtype: str, generation: tuple[int, int]
) -> None:
    graphs, _ = recorded(variant, dtype)
    for name, graph in graphs.items():
        plan, timings = tensorrt_build.build_plan(
            graph, Build(RTX, generation, OPTIONS, False), name, b""
        )
        assert plan and not timings  # kernels are compiled when they run


def test_plans_build_in_float32(trt: Any) -> None:
    graphs, _ = recorded("t5-1.1", "float32")
    for name, graph in graphs.items():
        assert tensorrt_build.build_plan(graph, Build(RTX, (8, 9), OPTIONS, False), name, b"")[0]


def test_weights_are_no_part_of_what_tensorrt_reads() -> None:
    graphs, _ = recorded("t5-1.1", "float16")
    for graph in graphs.values():
        onnx = weights_as_inputs(graph)
        assert b"weights" not in onnx  # the file that external data would name
        assert all(name.encode() in onnx for name in graph.parameters)


def test_an_operator_that_tensorrt_lacks_is_named(trt: Any) -> None:
    graphs, _ = recorded("t5-1.1", "float16")
    graph = graphs["cross"]
    graph = replace(graph, onnx=graph.onnx.replace(b"Reshape", b"Reshaqe"))
    with pytest.raises(EngineError, match="Reshaqe"):
        tensorrt_build.parse(trt, tensorrt_build.make_logger(trt), graph)


def test_a_build_that_takes_too_long_is_given_up(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, _ = recorded("t5-1.1", "float16")
    times = iter(range(10**6))
    monkeypatch.setattr(tensorrt_build.time, "monotonic", lambda: float(next(times)))
    options = EngineOptions(disk_cache=False, build_seconds=5)
    with pytest.raises(EngineError, match="build_seconds=5"):
        tensorrt_build.build_plan(
            graphs["encoder"], Build(RTX, (8, 9), options, False), "encoder", b""
        )


def test_a_gpu_that_tensorrt_cannot_build_for_is_refused(trt: Any) -> None:
    graphs, _ = recorded("t5-1.1", "float16")
    with pytest.raises(EngineError, match="SM90"):
        tensorrt_build.build_plan(
            graphs["encoder"], Build(RTX, (9, 0), OPTIONS, False), "encoder", b""
        )
