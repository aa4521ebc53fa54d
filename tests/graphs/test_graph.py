"""Graphs: what is in the bytes, what is left out, and their description."""

import json
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch

from fastgen.errors import UnsupportedConfigError
from fastgen.graphs import graph as graphs
from fastgen.graphs.decoder import decoder_specs
from fastgen.graphs.encoder import encoder_specs
from fastgen.graphs.graph import IR_DTYPES, WEIGHTS_FILE, Graph, TensorSpec
from fastgen.graphs.source import cross_specs
from fastgen.models.t5 import Decoder, DecoderStack, Encoder, distance_buckets
from fastgen.target import Target, onnxruntime_cpu, onnxruntime_cuda, tensorrt
from tests.configs import build_stock

TARGETS = {"cpu": onnxruntime_cpu()}
TARGETS |= {dtype: onnxruntime_cuda(dtype) for dtype in ("float32", "float16", "bfloat16")}
GRAPHS = ("encoder", "cross", "decoder", "decoder-masked")
VARIANTS = ("encoder-states", "decoder-states", "decoder-stack", "decoder-stack-states")


def build(name: str, kind: str, target: Target) -> Graph:
    """A graph of a variant, as its model builds it."""
    model: Any = build_stock(name)
    every_layer = name == "umt5"
    module: Any = model
    root: Any = Decoder(model.config, True, every_layer)
    masked, states = kind == "decoder-masked", kind.endswith("-states")
    if kind.startswith("encoder"):
        module, root = model.encoder, Encoder(model.encoder.config, every_layer)
        layers = root.depth if states else 0
        call, specs = root.encode, encoder_specs(target, model.config.d_model, layers)
    elif kind == "cross":
        call, specs = root.cross, cross_specs(target, root.shape)
    else:
        if kind.startswith("decoder-stack"):
            module, root = model.decoder, DecoderStack(model.decoder.config, every_layer)
        call, specs = root.decode, decoder_specs(target, root.shape, masked, states=states)
    types = {
        key: (target.dtype, tuple(parameter.shape))
        for key, parameter in module.named_parameters(remove_duplicate=False)
    }
    return graphs.build(root, target, types, call, *specs)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", GRAPHS + VARIANTS)
@pytest.mark.parametrize("name", ["t5-1.0", "t5-1.1", "umt5", "t5-shallow-decoder"])
def test_a_graph_is_what_its_description_says(name: str, kind: str, target: str) -> None:
    graph = build(name, kind, TARGETS[target])
    model = onnx.load_from_string(graph.onnx)
    assert_well_formed(model)
    for specs, values in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
        assert [spec.name for spec in specs] == [value.name for value in values]
        for spec, value in zip(specs, values, strict=True):
            tensor = value.type.tensor_type
            assert tensor.elem_type == IR_DTYPES[spec.dtype].value, spec.name
            shape = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
            assert tuple(shape) == spec.shape, spec.name
    external = {t.name for t in model.graph.initializer if t.data_location == t.EXTERNAL}
    assert external == set(graph.parameters)
    assert {o.domain: o.version for o in model.opset_import} == {
        "": TARGETS[target].opset,
        "com.microsoft": 1,
    }


def assert_well_formed(model: onnx.ModelProto) -> None:
    """Values are made once, before they are used; every value of a node is used or an output."""
    known = {v.name for v in model.graph.input} | {t.name for t in model.graph.initializer}
    used = {value.name for value in model.graph.output}
    for node in model.graph.node:
        assert {name for name in node.input if name} <= known, node.name
        made = {name for name in node.output if name}
        assert made
        assert not made & known
        known, used = known | made, used | set(node.input)
    assert {value.name for value in model.graph.output} <= known
    for node in model.graph.node:
        assert set(node.output) & used, f"{node.name} computes what nothing reads"


@pytest.mark.parametrize("kind", GRAPHS)
def test_no_weight_is_inside(kind: str) -> None:
    graph = build("byt5", kind, TARGETS["cpu"])
    stock = build_stock("byt5")
    assert len(graph.onnx) < sum(p.numel() for p in stock.parameters())
    for tensor in onnx.load_from_string(graph.onnx).graph.initializer:
        if tensor.name in graph.parameters:
            assert {e.key: e.value for e in tensor.external_data}["location"] == WEIGHTS_FILE
            assert not tensor.raw_data
        else:
            assert len(tensor.raw_data) < 1000, f"{tensor.name} is a large constant"


@pytest.mark.parametrize("kind", GRAPHS)
def test_building_twice_gives_the_same_bytes(kind: str) -> None:
    """Or two machines would never share an entry of the engine cache."""
    assert build("t5-1.1", kind, TARGETS["cpu"]) == build("t5-1.1", kind, TARGETS["cpu"])


def test_the_graphs_of_a_model_use_all_its_parameters() -> None:
    for name in ("t5-1.0", "umt5"):
        used = set(build(name, "encoder", TARGETS["cpu"]).parameters)
        assert used == dict(build_stock(name).encoder.named_parameters()).keys()
        used = {p for kind in GRAPHS[1:] for p in build(name, kind, TARGETS["cpu"]).parameters}
        own = dict(build_stock(name).named_parameters(remove_duplicate=False)).keys()
        assert used == {p for p in own if not p.startswith(("shared.", "encoder."))}


def test_operators_are_counted_with_their_domain() -> None:
    """Of a layer of T5 1.1's decoder: projections, scatters, attentions, norms."""
    found = build("t5-1.1", "decoder", TARGETS["float16"]).operators()
    assert found["com.microsoft.FusedMatMul"] == 2 * (4 + 2 + 3) + 1
    assert found["TensorScatter"] == 2 * 2
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_description_survives_json() -> None:
    graph = build("t5-1.1", "decoder", TARGETS["float16"])
    meta = json.loads(json.dumps(graph.meta()))
    assert Graph.from_meta(graph.onnx, meta) == graph
    assert graph.inputs[0] == TensorSpec("input_ids", "int64", ("B", "Q"))


def test_a_parameter_of_another_shape_makes_another_graph() -> None:
    target, config = TARGETS["cpu"], build_stock("t5-1.1").encoder.config
    graph = build("t5-1.1", "encoder", target)
    types = {
        key: (target.dtype, tuple(p.shape))
        for key, p in build_stock("t5-1.1").encoder.named_parameters()
    }
    types["embed_tokens.weight"] = (target.dtype, (120, config.d_model))
    root = Encoder(config)
    other = graphs.build(root, target, types, root.encode, graph.inputs, graph.outputs)
    assert other.onnx != graph.onnx
    assert other.parameters == graph.parameters


def test_float16_graphs_keep_the_residual_stream_in_float32() -> None:
    model = onnx.load_from_string(build("t5-1.1", "decoder", TARGETS["float16"]).onnx)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    norms = [n for n in model.graph.node if n.op_type == "SimplifiedLayerNormalization"]
    assert len(norms) == 3 * 2 + 1
    assert {types[node.input[0]] for node in norms} == {onnx.TensorProto.FLOAT}
    assert {types[node.output[0]] for node in norms} == {onnx.TensorProto.FLOAT16}


def test_targets_differ_in_layout_only_where_they_say() -> None:
    cpu, cuda = TARGETS["cpu"], TARGETS["bfloat16"]
    assert cpu.kv_shape(2, 3, 8, 4) == (2, 3, 8, 4)
    assert cuda.kv_shape(2, 3, 8, 4) == (2, 8, 3, 4)
    assert replace(cuda, dtype="float16").residual_dtype == "float32"
    assert cuda.residual_dtype == "bfloat16"


def test_a_target_that_needs_the_number_of_slots_gets_it_everywhere() -> None:
    shape = Decoder(build_stock("t5-1.1").config, False).shape
    with pytest.raises(ValueError, match=r"tensorrt-rtx compiles .* for one number of KV slots"):
        decoder_specs(tensorrt("float16", "tensorrt-rtx"), shape, slot_mask=True)
    specs = [s for side in decoder_specs(tensorrt("float16"), shape, False, 64) for s in side]
    slots = ("slot_positions", "slot_mask", "self_", "present_")
    assert [s.name for s in specs if 64 in s.shape] == [
        s.name for s in specs if s.name.startswith(slots)
    ]
    assert not any("L" in s.shape for s in specs)


# The table of relative positions that graphs hold


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("name", ["t5-1.0", "t5-buckets"])
def test_distance_buckets_are_those_of_the_stock_model(name: str, bidirectional: bool) -> None:
    config = build_stock(name).config
    buckets, reach = distance_buckets(config, bidirectional)
    highest = reach if bidirectional else 1
    assert len(buckets) == highest + 1 + reach
    attention = build_stock(name).decoder.block[0].layer[0].SelfAttention
    for distance in range(-3 * reach, (3 * reach if bidirectional else 0) + 1):
        expected = attention._relative_position_bucket(
            torch.tensor(distance),
            bidirectional=bidirectional,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )
        assert buckets[max(-reach, min(highest, distance))] == expected


@pytest.mark.parametrize(
    ("buckets", "distance"), [(32, 4), (8, 2), (1, 128), (2, 128), (32, 1), (32, 0)]
)
def test_positions_that_no_table_can_hold_are_refused_by_name(buckets: int, distance: int) -> None:
    config = build_stock("t5-1.0").config
    config.relative_attention_num_buckets = buckets
    config.relative_attention_max_distance = distance
    with pytest.raises(UnsupportedConfigError) as error:
        distance_buckets(config, bidirectional=True)
    assert f"relative_attention_num_buckets={buckets}" in str(error.value)
    assert f"relative_attention_max_distance={distance}" in str(error.value)
