"""What TensorRT for RTX makes of the standard graphs: products read the weights as they are, and a
step reads the KV buffers where they are. Nothing runs, so no GPU is needed."""

import logging
import re
from typing import Any, NamedTuple

import pytest

from fastgen.engines import tensorrt_build
from fastgen.engines.tensorrt_build import FLAVOURS, Build
from fastgen.errors import MissingRuntimeError
from fastgen.graph import Graph
from tests.engines.test_tensorrt_build import OPTIONS, recorded

RTX = FLAVOURS["tensorrt-rtx"]


class Layer(NamedTuple):
    """A launch of a plan, as TensorRT's verbose log describes it."""

    name: str  # of a layer in the first profile: "..._myl0_7"
    kind: str
    inputs: tuple[str, ...]


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
        if found := re.match(r"Name: (.+?), LayerType: (\w+), Inputs: (\[.*?\]), Constants", line):
            names = re.findall(r"{ Name: (.+?), Dimensions", found[3])
            layers.append(Layer(found[1], found[2], tuple(names)))
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
