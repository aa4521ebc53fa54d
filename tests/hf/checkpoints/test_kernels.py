"""Checkpoints in fewer bits in the fused kernels, without a GPU: what is recorded, and of whose
numbers."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import T5Config

import fastgen
from fastgen.blockwise import Format, blocks_of, dequantise, parse
from fastgen.engines.fused.engine import FusedEngine
from fastgen.engines.fused.ops import FusedOps
from fastgen.engines.fused.wide import WideOps
from fastgen.execution.bucket import Bucket, BucketSize
from fastgen.hf.checkpoints import table, torchao
from fastgen.hf.checkpoints.held import Held
from fastgen.target import onnxruntime_cuda
from tests.configs import build_pair
from tests.engines.test_packed_integers import off, round_products, t5_inputs
from tests.engines.test_packed_t5 import call
from tests.helpers import CLOSE
from tests.hf.checkpoints import fakes

TARGET = replace(onnxruntime_cuda("bfloat16"), held=True)
SIZE = BucketSize(1, 1, 64, 32)
CPU = torch.device("cpu")

#: How a library holds weights, what kernels read of those of 128 inputs, and whether its own.
READ: dict[str, tuple[fakes.Held, str, bool]] = {
    "int8": (fakes.torchao(), "Ints<8, 0, float, true, false>", True),
    "int8 zeros": (fakes.torchao(zeros=True), "Ints<8, 128, float, true, true>", True),
    "int8 groups": (fakes.torchao(group=64), "Ints<8, 64, float, true, false>", True),
    "int4": (fakes.torchao(bits=4), "Ints<4, 128, bf16>", False),
    "int4 zeros": (
        fakes.torchao(bits=4, group=64, zeros=True),
        "Ints<4, 64, bf16, false, true>",
        False,
    ),
    "quanto": (fakes.quanto(), "Ints<8, 0, float, true, false>", True),
    "bitsandbytes": (fakes.bitsandbytes, "Ints<8, 0, float, true, false>", True),
    "float8": (fakes.float8, "Fp8", True),
}


@pytest.fixture(autouse=True)
def float8_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torchao, "_on_gpu", lambda held: True)
    yield


@pytest.fixture(autouse=True)
def an_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the recording asks of a GPU."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    yield


def held_model(how: fakes.Held, **options: Any) -> Any:
    sizes = {"d_model": 128, "d_kv": 64, "d_ff": 128, "num_heads": 2, "num_layers": 1}
    config = T5Config(**sizes, vocab_size=96, decoder_start_token_id=0)
    model = fastgen.FastT5ForConditionalGeneration(config).eval().to(torch.bfloat16)
    fakes.hold(model, how)
    model.engine_options = options
    model._held = table.weights_in(table.known_in(model))
    return model


def recorded(model: Any, size: BucketSize = SIZE) -> FusedOps:
    """A step, whose launches nobody runs."""
    root, own = model._decoder_root(), model._weights(TARGET)
    held = model._held_for_kernels(own, root)
    for name, parameter in root.named_parameters():
        parameter.name, parameter._realized = name, True
    tensors = Bucket(root.shape, TARGET, CPU, size).tensors
    vocabulary = WideOps if size.batch > 16 else FusedOps
    ops = vocabulary(TARGET, own, tensors, held)
    results = root.decode(ops, **{n: t for n, t in tensors.items() if n != "logits"})
    ops.store(results["logits"], tensors["logits"])
    return ops


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("how", READ)
def test_kernels_read_a_librarys_own_values(how: str, batch: int) -> None:
    make, element, own = READ[how]
    model = held_model(make)
    ops = recorded(model, SIZE._replace(batch=batch))
    kernels = [body for body, _ in ops._names if "Ints" in body or "Fp8" in body]
    assert kernels and all(f"<{element}, " in body for body in kernels)
    read = {name: made for name, made in ops.made.items() if name.endswith(":values")}
    assert len(read) == 8  # all but the head, and the source's keys and values
    for name, values in read.items():
        parameter, _, _ = parse(name) or ("", None, 0)
        weight: Held = model._held[parameter]
        lies = weight.inside(weight.part())[0].data_ptr()  # type: ignore[arg-type]
        assert (values.data_ptr() == lies) == own


@pytest.mark.parametrize("how", READ)
def test_what_kernels_read_is_what_a_library_has(how: str) -> None:
    torch.manual_seed(0)
    linear: Any = torch.nn.Linear(128, 24, bias=False)
    linear.weight.data.add_(0.05)
    linear = READ[how][0](linear)
    (weight,) = table.weights_in(table.known_in(linear)).values()
    blocks = weight.blocks(weight.form_of_kernels(), torch.float32)
    known = weight.unpack(linear)
    times = 128 // known.scales.shape[1]
    steps = known.steps.float()
    if known.zeros is not None:
        steps = steps - known.zeros.float().repeat_interleave(times, 1)
    right = steps * known.scales.repeat_interleave(times, 1)
    assert torch.equal(dequantise(blocks, (24, 128), torch.float32), right)


def test_rows_that_no_group_divides_are_filled_up() -> None:
    """On a GPU alone, whose kernels take no group below 64."""
    linear = fakes.torchao(bits=4)(torch.nn.Linear(80, 8, bias=False))
    (weight,) = table.weights_in(table.known_in(linear)).values()
    assert weight.form(exact=False).group == 16
    form = weight.form_of_kernels()
    assert form == weight.form(exact=False, on_gpu=True) == Format("int4", 64)
    blocks = weight.blocks(form, torch.float32)
    own = weight.unpack(linear)
    same = blocks_of((own.steps + 8).to(torch.uint8), own.scales, None, form)
    assert torch.equal(blocks.values, same.values) and blocks.values.shape == (8, 2, 32)


def test_groups_that_kernels_lack_are_refused_with_a_reason() -> None:
    model = held_model(fakes.torchao(bits=4, group=32))
    root, own = model._decoder_root(), model._weights(TARGET)
    held = model._held_for_kernels(own, root)
    engine = FusedEngine(root, TARGET, own, None, held)
    reason = engine.make_weights(Bucket(root.shape, TARGET, CPU, SIZE).tensors)
    assert reason is not None and "128 inputs in groups of 32: fused kernels serve" in reason


def test_values_that_kernels_read_are_not_let_go() -> None:
    model = held_model(fakes.torchao(), keep_torch_weights=False)
    recorded(model)
    own = model._weights()
    assert own.made
    own.let_go()
    assert type(model.decoder.block[0].layer[0].SelfAttention.q.weight) is fakes.INT8


# Encoders, which torch computes here as a GPU's kernels would

INT8 = replace(onnxruntime_cuda("float32"), weights="int8", group=128)


@pytest.fixture
def as_on_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    with (
        mock.patch("fastgen.hf.building.choose_target", lambda *_: request.param),
        torch.no_grad(),
    ):
        yield


@pytest.mark.parametrize("as_on_a_gpu", [INT8], indirect=True)
@pytest.mark.parametrize("how", [fakes.torchao(), fakes.quanto(), fakes.bitsandbytes])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_encoders_multiply_a_librarys_own_integers(how: fakes.Held) -> None:
    pair = copy.deepcopy(build_pair("t5-1.1"))
    stock, fast = pair.stock.get_encoder(), pair.fast.get_encoder()
    fakes.hold(fast, how)
    fast.engine_options = {"weights": "int8"}
    found = fast(**call("holes"))[0]
    for name, weight in table.weights_in(table.known_in(fast)).items():
        part: Any = weight.part()
        known = weight.unpack(part)
        made = fast._made[name, Format("int8", 0)].blocks
        assert made.values.data_ptr() == known.steps.data_ptr()
        stock.get_parameter(name).copy_(known.steps * known.scales.float())
    assert fast._engine.fused is not None and not fast.narrow_reasons()
    seen = call("holes")["attention_mask"].bool()
    expected = round_products(stock, t5_inputs)(**call("holes"))[0]
    assert off(found[seen], expected[seen]) < 0.02  # weights rounded once more are the same


WHOLE = replace(INT8, weights="full")


@pytest.mark.parametrize("as_on_a_gpu", [WHOLE, replace(WHOLE, weights="fp8")], indirect=True)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_graphs_read_8_bit_floats_in_full() -> None:
    """Those of encoders, and whatever else has no fused kernels."""
    pair = copy.deepcopy(build_pair("t5-1.1"))
    for model in (pair.stock, pair.fast):
        fakes.hold(model, fakes.float8)
    stock, fast = pair.stock.get_encoder(), pair.fast.get_encoder()
    torch.testing.assert_close(fast(**call(None))[0], stock(**call(None))[0], **CLOSE)
    assert fast._engine.fused is not None and fast.narrow_weights() == "torchao's fp8"
    for model in (stock, fast):
        model.block[0].layer[1].DenseReluDense.wo.weight.scale.mul_(3)
    torch.testing.assert_close(fast(**call(None))[0], stock(**call(None))[0], **CLOSE)
    assert fast.narrow_weights() == "torchao's fp8"


@pytest.mark.parametrize(
    ("as_on_a_gpu", "how", "reason"),
    [
        (WHOLE, fakes.torchao(), "which EngineOptions(weights='int8') asks for"),
        (INT8, fakes.torchao(group=16), "integers in groups of 16 or with zeros"),
    ],
    indirect=["as_on_a_gpu"],
)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_why_encoders_do_not_is_told(how: fakes.Held, reason: str) -> None:
    fast = copy.deepcopy(build_pair("t5-1.1").fast).get_encoder()
    fakes.hold(fast, how)
    fast._drop_engine()
    fused = fast._fused_engine(fast._choose_target(), padding=False)
    (said,) = fast.narrow_reasons()
    assert fused is None and said.startswith("ONNX Runtime's kernels run FastT5Stack: ")
    assert said.endswith(reason)
