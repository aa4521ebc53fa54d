"""What TensorRT for RTX makes of the standard graphs: products read the weights as they are, and a
step reads the KV buffers where they are. Nothing runs, so no GPU is needed."""

import logging
import re
from typing import Any, NamedTuple

import pytest

from fastgen.engines import tensorrt_build
from fastgen.engines.tensorrt_build import FLAVOURS, Build
from fastgen.errors import MissingRuntimeError
from fastgen.graphs.graph import Graph
from fastgen.target import onnxruntime_tensorrt
from tests.engines.test_tensorrt_build import OPTIONS, recorded

RTX = FLAVOURS["tensorrt-rtx"]


class Layer(NamedTuple):
    """A launch of a plan, as TensorRT's verbose log describes it."""

    name: str  # of a layer in the first profile: "..._myl0_7"; it tells what is fused in it
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@pytest.fixture(scope="module")
def trt() -> Any:
    try:
        return tensorrt_build.load(RTX)
    except MissingRuntimeError as error:
        pytest.skip(f"no TensorRT for RTX here: {error}")


def compiled(trt: Any, graph: Graph, caplog: pytest.LogCaptureFixture) -> list[Layer]:
    """The layers of a graph's plan for compute capability 8.9."""
    logger = tensorrt_build.make_logger(trt)
    builder, network = tensorrt_build.parse(trt, logger, graph)
    config = tensorrt_build.configure(trt, builder, graph, Build(RTX, (8, 9), OPTIONS, False))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    with caplog.at_level(logging.DEBUG, logger="fastgen.tensorrt"):
        assert builder.build_serialized_network(network, config) is not None
    (text,) = [m for m in caplog.messages if m.startswith("Layers:")]
    caplog.clear()
    layers = []
    for line in text.partition("I/O Tensors")[0].splitlines()[1:]:
        form = r"Name: (.+?), LayerType: (\w+), Inputs: (\[.*?\]), Constants.* Outputs: (\[.*?\])"
        if found := re.match(form, line):
            sides = [re.findall(r"{ Name: (.+?), Dimensions", found[side]) for side in (3, 4)]
            layers.append(Layer(found[1], found[2], *map(tuple, sides)))
    assert layers
    return layers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["t5-1.0", "t5-1.1", "umt5"])
def test_products_read_the_weights_as_they_are(
    trt: Any, variant: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No launch casts, transposes or copies a weight; a float16 product that accumulates in
    float32 is one launch."""
    for name, graph in recorded(variant, dtype)[0].items():
        projections = [p for p in graph.parameters if not re.search("embed|bias|norm", p)]
        found = compiled(trt, graph, caplog)
        readers = {p: [layer for layer in found if p in layer.inputs] for p in projections}
        for parameter, layers in readers.items():
            assert layers, f"{name}: nothing reads {parameter}"
            assert {layer.kind for layer in layers} <= {"gemm", "runtime_fusion"}, parameter


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("variant", ["t5-1.0", "umt5"])
def test_a_step_reads_kv_buffers_in_place(
    trt: Any, variant: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the profile of plain steps a KV buffer is scattered into and attended to, never copied."""
    graphs, _ = recorded(variant, dtype)
    graph = next(g for name, g in graphs.items() if name.startswith("decoder"))
    step = [layer for layer in compiled(trt, graph, caplog) if "_myl0_" in layer.name]
    buffers = [
        s.name for s in (*graph.inputs, *graph.outputs) if re.match("self|cross_[kv]|pres", s.name)
    ]
    for buffer in buffers:
        readers = [layer.name for layer in step if buffer in layer.inputs]
        assert all("Scat" in name or "_mha_" in name for name in readers), (buffer, readers)
    attended = [layer for layer in step if "_mha_" in layer.name]
    assert len(attended) == 2 * sum(s.name.startswith("self_key") for s in graph.inputs)


def test_nothing_multiplies_the_keys(trt: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The parser multiplies keys by the root of Attention's scale; in every profile that has become
    a part of the product with them."""
    graphs, _ = recorded("t5-1.1", "bfloat16")
    graph = next(g for name, g in graphs.items() if name.startswith("decoder"))
    layers = compiled(trt, graph, caplog)
    keys = {s.name for s in (*graph.inputs, *graph.outputs) if "key." in s.name}
    keys |= {f"{name} [profile 1]" for name in keys}
    moved: set[str] = set()
    while keys - moved:  # what launches that only move things make of the keys
        moved |= keys
        for layer in (layer for layer in layers if keys & set(layer.inputs)):
            assert "Mul" not in layer.name, layer
            if not re.search("Scat|_mha_|_fc|Soft|Max", layer.name) and layer.kind == "kgen":
                keys |= set(layer.outputs)
    assert len(keys) > 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_written_as_products_is_built_and_fused(
    trt: Any, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime's provider cannot say that an Attention may be served by several kernels, and
    TensorRT then refuses one that no fused kernel serves: so it gets the products."""
    graphs, _ = recorded("t5-1.1", dtype, onnxruntime_tensorrt(dtype))
    assert not any("Attention" in graph.operators() for graph in graphs.values())
    graph = next(g for name, g in graphs.items() if name.startswith("decoder"))
    fused = [layer for layer in compiled(trt, graph, caplog) if "_mha_" in layer.name]
    assert len(fused) == 2 * sum(s.name.startswith("self_key") for s in graph.inputs)
