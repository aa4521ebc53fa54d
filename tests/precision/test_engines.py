"""Engines by what was found: the float16 graphs that TensorRT gets run on the CPU by ONNX Runtime;
those of its CUDA provider are read."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from fastgen.engines import NotFused
from fastgen.engines.fused.ops import FusedOps
from fastgen.engines.fused.packed_described import Ids, Visible
from fastgen.engines.fused.packed_ops import PackedOps
from fastgen.execution.bucket import Bucket, BucketSize
from fastgen.graphs import graph as graphs
from fastgen.graphs.decoder import decoder_specs
from fastgen.graphs.encoder import encoder_specs
from fastgen.graphs.source import cross_specs
from fastgen.hf import found
from fastgen.hf.weights import tensors_of
from fastgen.ops import names
from fastgen.precision import Precision, find_unstable
from fastgen.target import Target, onnxruntime_cuda
from tests.precision.overflowing import FAMILIES, scaled
from tests.standard import cpu_target


@pytest.fixture
def float16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models in float16 compile the graphs that TensorRT gets."""

    def choose(options: Any, device: torch.device, dtype: torch.dtype) -> Target:
        return replace(cpu_target(str(dtype).removeprefix("torch.")), static_slots=False)

    monkeypatch.setattr("fastgen.hf.building.choose_target", choose)
    monkeypatch.setattr("fastgen.models.bert.FastBertModel._pooler_root", lambda model: None)


def call(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    names = ["input_ids", "decoder_input_ids"][: 1 + model.config.is_encoder_decoder]
    found = {name: torch.randint(3, 96, (6, 9), generator=generator) for name in names}
    if model.config.model_type == "umt5":  # not causal within several tokens in transformers 5.17
        found["decoder_input_ids"] = found["decoder_input_ids"][:, :1]
    return found


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    """Logits, or hidden states where there is no head, in float32."""
    given = call(model)
    if hasattr(model, "refusal"):
        assert model.refusal(**given) is None
    output: torch.Tensor = model(**given)[0]
    return output.float()


def error(low: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((low - exact).norm() / exact.norm()).nan_to_num(float("inf")))


@pytest.mark.parametrize("name", FAMILIES)
def test_float16_engines_are_near_to_float32(name: str, float16_on_the_cpu: None) -> None:
    """Where naive float16 overflows, and but for T5 the rules do, too."""
    model = scaled(name, *FAMILIES[name])
    exact, ruled = outputs(model), copy.deepcopy(model).half()
    if name in ("gpt2", "bart", "bert"):
        assert not error(outputs(ruled), exact) < 0.5
    precision = find_unstable(model)
    low = outputs(model.half())
    engine = model._engine
    assert set(engine.target.wide) <= {*precision.wide}
    assert error(low, exact) < max(0.03, 2 * precision.errors.found)
    if name == "t5-1.1":  # gated, a position table, two graphs with it
        assert model.generate(call(model)["input_ids"], max_new_tokens=4).shape[1] > 1


@pytest.mark.parametrize("factor", [1.0, 2e4])
def test_weights_that_transformers_keeps_in_float32(
    factor: float, tmp_path: Path, float16_on_the_cpu: None
) -> None:
    """T5's ``wo``, in a model that was loaded in float16: looked at as it is."""
    model = scaled("t5-1.1", ".wo.weight", factor)
    model.save_pretrained(tmp_path)
    low = type(model).from_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in low.parameters()} == {torch.float16, torch.float32}
    precision = find_unstable(low)
    assert bool(precision.kept) == (factor > 1)
    assert error(outputs(low), outputs(model)) < max(0.03, 2 * precision.errors.found)
    assert low._engine.target.wide is not None


# The graphs of ONNX Runtime's CUDA provider


def graphs_of(model: Any, wide: tuple[str, ...] | None) -> dict[str, onnx.ModelProto]:
    """The float16 graphs of an encoder-decoder for a GPU, by name."""
    encoder = model.get_encoder()
    path = next(n for n, m in model.named_modules() if m is encoder) + "."
    inside = (
        None if wide is None else tuple(n.removeprefix(path) for n in wide if n.startswith(path))
    )
    target = replace(onnxruntime_cuda("float16"), wide=wide)
    inner, shape = replace(target, wide=inside), model._decoder_root().shape

    def build(module: Any, target: Target, root: Any, method: str, specs: Any) -> onnx.ModelProto:
        types = {n: ("float16", tuple(t.shape)) for n, t in tensors_of(module).items()}
        made = graphs.build(root, target, types, getattr(root, method), *specs)
        return onnx.load_from_string(made.onnx)

    root = model._decoder_root
    return {
        "encoder": build(
            encoder, inner, encoder._encoder_root(), "encode", encoder_specs(inner, shape.width)
        ),
        "cross": build(model, target, root(), "cross", cross_specs(target, shape)),
        "decoder": build(model, target, root(), "decode", decoder_specs(target, shape, False)),
    }


def float_casts(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Casts of values between float32 and float16; those of parameters are done once."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    kinds = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    return [
        node
        for node in graph.graph.node
        if node.op_type == "Cast"
        and onnx.helper.get_node_attr_value(node, "to") in kinds
        and node.input[0] not in weights
    ]


def ranged(precision: Precision) -> int:
    """Linears whose float16 products are cast to be scaled up again."""
    linears = {kept.name for kept in precision.kept if kept.kind == "linear"}
    return sum(names.product(name) not in precision.wide for name in linears)


@pytest.mark.parametrize(
    ("name", "part"), [("t5-1.1", ".wo.weight"), ("t5-1.1", ".o.weight"), ("mt5", ".wo.weight")]
)
def test_graphs_have_the_casts_that_are_counted_and_none_cancels(name: str, part: str) -> None:
    model = scaled(name, part, 3e4)
    precision = find_unstable(model)
    made = graphs_of(model, precision.wide)
    casts = {graph: float_casts(found) for graph, found in made.items()}
    assert sum(map(len, casts.values())) == precision.casts + ranged(precision)
    rules = {graph: float_casts(found) for graph, found in graphs_of(model, None).items()}
    assert sum(map(len, casts.values())) <= sum(map(len, rules.values()))
    for nodes in casts.values():
        cast = {node.output[0] for node in nodes}
        assert not cast & {node.input[0] for node in nodes}
        assert len({(n.input[0], str(n.attribute)) for n in nodes}) == len(nodes)


@pytest.mark.parametrize("name", ["t5-1.1", "bart"])
def test_a_model_that_float16_holds_has_no_casts(name: str) -> None:
    """And ONNX Runtime's kernels that add and norm in one serve all of its residual streams."""
    model = scaled(name)
    precision = find_unstable(model)
    for graph in graphs_of(model, precision.wide).values():
        assert not float_casts(graph)
    kinds = [node.op_type for node in graphs_of(model, ())["decoder"].graph.node]
    assert sum(kind.startswith("Skip") for kind in kinds) == 6


# Fused kernels


def packed(model: Any) -> PackedOps:
    """An encoder recorded over packed tokens, by what was found for it."""
    root, own = model._encoder_root(), tensors_of(model)
    for name, parameter in root.named_parameters():
        parameter.name, parameter._realized = name, True
    target = replace(onnxruntime_cuda("float16"), wide=found.recalled(model))
    halves = {name: tensor.detach().half() for name, tensor in own.items()}
    ops = PackedOps(target, halves)
    root.encode(
        ops,
        input_ids=Ids("input_ids"),
        token_type_ids=Ids("token_type_ids"),
        query_positions=None,
        key_positions=Ids(None),
        attention_mask=Visible(),
    )
    return ops


def test_packed_kernels_refuse_what_they_would_give_in_float16() -> None:
    model = scaled("bert", *FAMILIES["bert"])
    assert packed(model).launches
    find_unstable(model)
    with pytest.raises(NotFused, match=r"output\.dense is to be float32"):
        packed(model)
    plain = scaled("bert")
    find_unstable(plain)
    assert found.recalled(plain) == () and packed(plain).launches


@pytest.mark.parametrize(
    ("part", "refused"),
    [(".wo.weight", None), (".wi_1.weight", "wi_1"), (".wi_0.weight", "wi_0")],
)
def test_fused_steps_refuse_what_they_would_give_in_float16(
    part: str, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual stream, and what is added to it, they have in float32 anyway."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    model = scaled("flan", part, 2e4)
    precision = find_unstable(model)
    root, own, device = model._decoder_root(), tensors_of(model), torch.device("cpu")
    for name, parameter in root.named_parameters():
        parameter.name, parameter._realized = name, True
    target = replace(onnxruntime_cuda("float16"), wide=found.recalled(model))
    assert target.wide and precision.errors.naive == float("inf")
    tensors = Bucket(root.shape, target, device, BucketSize(1, 1, 64, 16)).tensors
    halves = {name: tensor.detach().half() for name, tensor in own.items()}
    ops = FusedOps(target, halves, tensors)
    inputs = {name: tensor for name, tensor in tensors.items() if name != "logits"}
    if refused is None:
        root.decode(ops, **inputs)
        assert ops.launches
        return
    with pytest.raises(NotFused, match=rf"{refused} is to be float32"):
        root.decode(ops, **inputs)


# What is remembered


def test_an_answer_belongs_to_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever dtype they were looked at, in other processes and from another folder; not to
    weights that were trained since."""
    model = scaled("t5-1.1", *FAMILIES["t5-1.1"])
    model.engine_options = {"cache_dir": tmp_path / "cache"}
    parts = [model, model.encoder, model.decoder]
    assert [found.recalled(part) for part in parts] == [None] * 3
    precision = find_unstable(model)
    monkeypatch.setattr(found, "_here", {})  # another process
    whole, encoder, decoder = (found.recalled(part) for part in parts)
    inside = {name for name in precision.wide if name.startswith("encoder.")}
    assert {f"encoder.{name}" for name in encoder} == inside
    assert {*whole} == {*precision.wide} - inside
    assert {f"decoder.{name}" for name in decoder} == {*whole}
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(
        tmp_path / "model", dtype=torch.float16, engine_options={"cache_dir": tmp_path / "cache"}
    )
    assert loaded.decoder.block[0].layer[2].DenseReluDense.wo.weight.dtype == torch.float32
    assert found.recalled(loaded) == whole and found.recalled(loaded.encoder) == encoder
    with torch.no_grad():
        loaded.shared.weight[3, 3] += 1
    assert found.recalled(loaded) is None


def test_what_is_kept_in_memory_only_leaves_no_file(tmp_path: Path) -> None:
    model = scaled("gpt2", *FAMILIES["gpt2"])
    model.engine_options = {"cache_dir": tmp_path, "disk_cache": False}
    precision = find_unstable(model)
    assert found.recalled(model) == precision.wide
    assert not [*tmp_path.iterdir()]


def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled("gpt2", *FAMILIES["gpt2"])
    model.engine_options = {"cache_dir": tmp_path}
    find_unstable(model)
    monkeypatch.setattr(found, "_here", {})
    (file,) = tmp_path.glob("*.float16")
    for text in ("{", "[]"):
        file.write_text(text)
        assert found.recalled(model) is None


def test_other_dtypes_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled("gpt2")
    monkeypatch.setattr(found, "recalled", None)
    outputs(model)
    assert model._engine.target.wide is None
