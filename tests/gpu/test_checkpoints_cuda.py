"""Checkpoints in fewer bits in the fused kernels, against torch over what values stand for."""

import copy
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import T5Config

import fastgen
from fastgen.blockwise import Format
from fastgen.engines import nvrtc
from fastgen.engines.fused.engine import FusedBinding
from fastgen.engines.fused.ops import FusedOps
from fastgen.engines.fused.products import TILE_ROWS
from fastgen.engines.fused.recorder import Narrow
from fastgen.engines.fused.wide import WideOps
from fastgen.hf.checkpoints import table
from fastgen.hf.checkpoints.held import Held
from fastgen.hf.let_go import Gone
from fastgen.target import onnxruntime_cuda
from tests.gpu.models import DEVICE, MEDIUM
from tests.hf.checkpoints import fakes

pytestmark = pytest.mark.cuda

#: How a library holds weights of 512 inputs, and whether kernels read its own values.
HOWS: dict[str, tuple[fakes.Held, bool]] = {
    "int8": (fakes.torchao(), True),
    "int8 zeros": (fakes.torchao(zeros=True), True),
    "int8 groups": (fakes.torchao(group=128), True),
    "int8 groups zeros": (fakes.torchao(group=64, zeros=True), True),
    "int4": (fakes.torchao(bits=4), False),
    "int4 groups": (fakes.torchao(bits=4, group=128), False),
    "int4 groups zeros": (fakes.torchao(bits=4, group=64, zeros=True), False),
    "int3 zeros": (fakes.torchao(bits=3, group=256, zeros=True), False),
    "quanto": (fakes.quanto(), True),
    "bitsandbytes": (fakes.bitsandbytes, True),
    "float8": (fakes.float8, True),
}


def known(linear: torch.nn.Module) -> Held:
    """What the readers say of a layer."""
    (found,) = table.weights_in(table.known_in(linear)).values()
    return found


def exact(weight: Held) -> Tensor:
    """What its values stand for, in float64, which holds them exactly."""
    part = weight.part()
    assert part is not None
    own = weight.unpack(part)
    times = weight.shape[1] // own.scales.shape[1]
    steps, scales = own.steps.double(), own.scales.double().repeat_interleave(times, 1)
    if own.zeros is not None:
        steps = steps - own.zeros.double().repeat_interleave(times, 1)
    return steps * scales


def held_linear(how: fakes.Held, inputs: int, outputs: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias=False, device=DEVICE).to(dtype)
    linear.weight.data.add_(0.5 * inputs**-0.5)  # so that zero points are no middle
    return how(linear)


def recorded(rows: int, dtype: torch.dtype, **layers: Any) -> FusedOps:
    """A vocabulary over layers of a library's, by name."""
    parameters, held = {}, {}
    for name, layer in layers.items():
        weight = known(layer)
        form = weight.form_of_kernels()
        blocks = weight.blocks(form, dtype)
        parameters |= {n: blocks.part(i) for i, n in enumerate(form.names(name))}
        held[name] = Narrow(form, weight.shape)
    target = onnxruntime_cuda(str(dtype).removeprefix("torch."))
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)
    vocabulary = FusedOps if rows <= TILE_ROWS else WideOps
    return vocabulary(target, parameters, {"input_ids": ids}, held)


def run(ops: FusedOps) -> None:
    FusedBinding(ops, nvrtc.program(ops.source(), DEVICE)).run()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 7, 16, 40])
@pytest.mark.parametrize("how", HOWS)
def test_a_product_is_that_of_what_the_values_stand_for(
    how: str, rows: int, dtype: torch.dtype
) -> None:
    layer = held_linear(HOWS[how][0], 512, 328, dtype)
    x = torch.randn(rows, 512, device=DEVICE).to(dtype)
    ops = recorded(rows, dtype, w=layer)
    y = torch.empty(rows, 1, 328, dtype=dtype, device=DEVICE)
    ops.store(ops.linear(x, SimpleNamespace(name="w")), y)
    run(ops)
    right = x.double() @ exact(known(layer)).T
    assert float((y.flatten(0, 1) - right).norm() / right.norm()) <= torch.finfo(dtype).eps / 2
    values = next(iter(ops.made.values()))
    assert (values.data_ptr() == known(layer).inside(layer)[0].data_ptr()) == HOWS[how][1]


@pytest.mark.parametrize("how", ["int8", "int8 zeros", "int4"])
@pytest.mark.parametrize("rows", [1, 20])
def test_rows_that_no_group_divides(how: str, rows: int) -> None:
    """Those of a scale each; int4 of them is filled up."""
    layer = held_linear(HOWS[how][0], 1040, 40, torch.bfloat16)
    if how == "int8 zeros":  # of groups that the kernels lack: the values are laid out anew
        assert not known(layer).form_of_kernels().signed
    x = torch.randn(rows, 1040, device=DEVICE).bfloat16()
    ops = recorded(rows, torch.bfloat16, w=layer)
    y = torch.empty(rows, 1, 40, dtype=torch.bfloat16, device=DEVICE)
    ops.store(ops.linear(x, SimpleNamespace(name="w")), y)
    run(ops)
    right = x.double() @ exact(known(layer)).T
    assert float((y.flatten(0, 1) - right).norm() / right.norm()) <= 2**-8  # scales are rounded


@pytest.mark.parametrize("how", ["int8", "int8 groups zeros", "int4 groups zeros"])
@pytest.mark.parametrize("rows", [1, 4, 16, 40])
def test_norm_and_gate_around_products(rows: int, how: str) -> None:
    make = HOWS[how][0]
    first, second = (held_linear(make, 512, 384, torch.bfloat16) for _ in range(2))
    second.weight.scale.mul_(0.5)
    ops = recorded(rows, torch.bfloat16, first=first, second=second)
    stream = ops._stream(512)
    stream.tensor.copy_(torch.randn(rows, 512, device=DEVICE))
    ones = torch.ones(512, dtype=torch.bfloat16, device=DEVICE)
    ops._parameters["norm"] = ones  # type: ignore[index]
    normed = ops.rms_norm(stream, SimpleNamespace(name="norm"), 1e-6)
    gate = ops.activation(ops.linear(normed, SimpleNamespace(name="first")), "silu")
    ops._linear(
        y := torch.empty(rows, 384, dtype=torch.bfloat16, device=DEVICE),
        [gate.product, ops.linear(normed, SimpleNamespace(name="second"))],
        "GATE",
        "silu",
    )
    run(ops)
    x = stream.tensor.double()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    one, other = (x @ exact(known(layer)).T for layer in (first, second))
    right = torch.nn.functional.silu(one) * other
    assert float((y - right).norm() / right.norm()) <= torch.finfo(torch.bfloat16).eps


# Models


def models(how: fakes.Held, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Any, Any]:
    """A Fast T5 whose weights are held so, and a stock one in float64 with what they stand for."""
    config = T5Config(**MEDIUM | {"d_kv": 64}, tie_word_embeddings=False)
    torch.manual_seed(0)
    fast = fastgen.FastT5ForConditionalGeneration(copy.deepcopy(config)).eval().to(DEVICE, dtype)
    wide = transformers.T5ForConditionalGeneration(config).eval().to(DEVICE, torch.float64)
    wide.load_state_dict(fast.state_dict())
    fakes.hold(fast, how)
    for name, weight in table.weights_in(table.known_in(fast)).items():
        wide.get_parameter(name).data.copy_(exact(weight))
    fast.engine_options = options
    return fast, wide


IDS = torch.randint(3, 500, (3, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def generated(model: Any, rows: int = 3) -> Any:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 512}
    options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    return model.generate(IDS[:1].repeat(rows, 1).to(DEVICE), **options)


@torch.no_grad()
def runs_fused(model: Any, rows: int = 3) -> Any:
    """Of a call that gives its KV cache back."""
    model.generate(IDS[:1].repeat(rows, 1).to(DEVICE), max_new_tokens=2)
    return model.ran_fused()


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["int8", "int8 groups zeros", "int4 groups", "quanto", "float8"])
def test_models_run_fused(how: str, dtype: torch.dtype, rows: int) -> None:
    fast, wide = models(HOWS[how][0], dtype)
    ours, right = generated(fast, rows), generated(wide, rows)
    assert runs_fused(fast, rows)
    first, theirs = ours.logits[0].double(), right.logits[0]
    assert float((first - theirs).norm() / theirs.norm()) <= 8 * torch.finfo(dtype).eps
    library, kind = "quanto" if how == "quanto" else "torchao", known_form(fast).kind
    path, *reasons = str(fast.explain()).splitlines()
    assert path == f"fast loop, {library}'s {kind} weights"
    assert len(reasons) == (kind != "fp8")  # encoders read a copy of those in full
    assert all("ONNX Runtime's kernels run FastT5Stack: " in reason for reason in reasons)


def test_bitsandbytes_where_fewer_bits_are_asked_for() -> None:
    fast, wide = models(fakes.bitsandbytes, weights="int8", keep_torch_weights=False)
    ours, right = generated(fast), generated(wide)
    assert runs_fused(fast) and fast.encoder._engine.fused is not None
    first, theirs = ours.logits[0].double(), right.logits[0]
    assert float((first - theirs).norm() / theirs.norm()) <= 0.1  # head and activations are rounded
    weight = fast.encoder.block[0].layer[0].SelfAttention.q.weight
    made = fast.encoder._made["block.0.layer.0.SelfAttention.q.weight", Format("int8", 0)]
    assert made.blocks.values.data_ptr() == weight.data_ptr()


def test_weights_that_kernels_read_stay_and_others_go() -> None:
    fast, _ = models(fakes.torchao(), keep_torch_weights=False)
    kept, _ = models(fakes.torchao())
    for rows in (1, 3, 24):
        assert torch.equal(generated(fast, rows).sequences, generated(kept, rows).sequences)
    gone = {n for n, p in fast.named_parameters() if isinstance(p, Gone)}
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" in gone
    read = fast.decoder.block[0].layer[0].SelfAttention.q.weight
    assert not isinstance(read, Gone)
    gc.collect()
    made = fast._made["decoder.block.0.layer.0.SelfAttention.q.weight", known_form(fast)]
    assert made.blocks.values.data_ptr() == read.qdata.data_ptr()


def known_form(fast: Any) -> Any:
    return known(fast.decoder.block[0].layer[0].SelfAttention.q).form_of_kernels()


def test_edits_are_noticed() -> None:
    fast, _ = models(fakes.torchao())
    before = generated(fast).logits[0]
    fast.decoder.block[0].layer[2].DenseReluDense.wo.weight.scale.mul_(3)
    after = generated(fast).logits[0]
    assert runs_fused(fast) and not torch.equal(before, after)


def test_groups_that_kernels_lack_are_told() -> None:
    fast, wide = models(fakes.torchao(bits=4, group=32))
    ours, right = generated(fast), generated(wide)
    assert runs_fused(fast) is None
    words = "ONNX Runtime's kernels run FastT5ForConditionalGeneration: int4 of decoder."
    assert words in str(fast.explain())
    first, theirs = ours.logits[0].double(), right.logits[0]
    assert float((first - theirs).norm() / theirs.norm()) <= 8 * torch.finfo(torch.bfloat16).eps
