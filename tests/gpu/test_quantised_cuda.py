"""Weights of fewer bits in the fused kernels, against torch over what they stand for."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, GPT2Config, T5Config
from transformers.modeling_outputs import BaseModelOutput

import fastgen
from fastgen.blockwise import GROUPS, KINDS, Blocks, Format, dequantise, quantise
from fastgen.engines import nvrtc
from fastgen.engines.fused.engine import FusedBinding
from fastgen.engines.fused.ops import FusedOps
from fastgen.engines.fused.products import TILE_ROWS
from fastgen.engines.fused.wide import WideOps
from fastgen.hf.contract import CACHE
from fastgen.hf.let_go import Gone
from fastgen.target import onnxruntime_cuda
from tests.gpu.models import DEVICE

pytestmark = pytest.mark.cuda

NARROW = [torch.bfloat16, torch.float16]
#: Inputs, outputs, rows.
SIZES = [
    (512, 512, 1),
    (1024, 96, 2),
    (1600, 100, 1),
    (1600, 1601, 4),
    (4096, 1024, 1),
    (16384, 40, 1),
    (16384, 40, 3),
    (208, 33, 5),
    (2816, 264, 8),
    (1024, 4096, 9),
    (1024, 300, 16),
    (1600, 501, 17),
    (6400, 3000, 64),
]


class Bench:
    """A few products by random weights, recorded as a step records them."""

    def __init__(
        self, kind: Any, rows: int, dtype: torch.dtype, group: int | None = None, wide: Any = None
    ) -> None:
        """``wide``: dtype of the weights, if not that of activations."""
        self.kind, self.dtype, self.wide, self.rows = kind, dtype, wide or dtype, rows
        self.group = GROUPS[kind] if group is None else group
        self.parameters: dict[str, Tensor] = {}
        name = str(dtype).removeprefix("torch.")
        target = replace(onnxruntime_cuda(name), weights=kind, group=self.group)
        vocabulary = FusedOps if rows <= TILE_ROWS else WideOps
        ids = torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)
        self.ops = vocabulary(target, self.parameters, {"input_ids": ids})
        self.generator = torch.Generator(DEVICE).manual_seed(0)

    def noise(self, *axes: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(axes, generator=self.generator, device=DEVICE)
        return drawn.to(dtype or self.dtype)

    def vector(self, name: str, size: int) -> Any:
        self.parameters[name] = self.noise(size)
        return SimpleNamespace(name=name)

    def weight(self, name: str, inputs: int, outputs: int, transposed: bool = False) -> Any:
        whole = self.noise(outputs, inputs, dtype=torch.float32) * inputs**-0.5
        weight = whole.to(self.wide)
        self.parameters[name] = weight.T.contiguous() if transposed else weight
        blocks = quantise(weight, self.kind, self.group)
        names = Format(self.kind, self.group, transposed).names(name)
        self.parameters |= dict(zip(names, (blocks.values, blocks.scales), strict=True))
        self.parameters[f"exact {name}"] = exact(blocks, (outputs, inputs))
        return SimpleNamespace(name=name)

    def result(self, product: Any, outputs: int) -> Tensor:
        y = torch.empty(self.rows, 1, outputs, dtype=self.dtype, device=DEVICE)
        self.ops.store(product, y)
        self.run()
        return y.flatten(0, 1).double()

    def run(self) -> None:
        FusedBinding(self.ops, nvrtc.program(self.ops.source(), DEVICE)).run()

    def check(self, found: Tensor, right: Tensor) -> None:
        distance = (found.double() - right).norm() / right.norm()
        assert distance <= 0.5 * torch.finfo(self.dtype).eps


def exact(blocks: Blocks, shape: tuple[int, int]) -> Tensor:
    """What the blocks stand for, in float64: values and scales are exact there."""
    wide = replace(blocks, scales=blocks.scales.float())
    return dequantise(wide, shape, torch.float32).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("inputs", "outputs", "rows"), SIZES)
def test_a_product_is_that_of_what_the_weights_stand_for(
    inputs: int, outputs: int, rows: int, dtype: torch.dtype, kind: Any
) -> None:
    bench = Bench(kind, rows, dtype)
    x, weight = bench.noise(rows, inputs), bench.weight("w", inputs, outputs)
    bias = bench.vector("b", outputs)
    found = bench.result(bench.ops.linear(x, weight, bias, 0.5), outputs)
    whole = x.double() @ bench.parameters["exact w"].T
    bench.check(found, 0.5 * whole + bench.parameters["b"].double())


@pytest.mark.parametrize("rows", [1, 6, 20])
@pytest.mark.parametrize(("kind", "group"), [("int8", 64), ("int4", 128), ("int8", 256)])
def test_other_groups_and_rows_that_do_not_fill_them(kind: Any, group: int, rows: int) -> None:
    bench = Bench(kind, rows, torch.bfloat16, group)
    x, weight = bench.noise(rows, 1000), bench.weight("w", 1000, 72, transposed=True)
    found = bench.result(bench.ops.linear(x, weight, transposed=True), 72)
    bench.check(found, x.double() @ bench.parameters["exact w"].T)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_exact(kind: Any) -> None:
    """An input of one shows a column of the weight."""
    bench = Bench(kind, 1, torch.bfloat16)
    weight = bench.weight("w", 256, 256)
    values, _ = (bench.parameters[n] for n in Format(kind, bench.group).names("w"))
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    if kind == "fp8":
        codes = torch.where((codes & 127) == 127, 0, codes)  # NaN
    raw = values.view(torch.uint8)
    raw.copy_(codes.repeat(raw.numel() // 256).view(raw.shape))
    names = Format(kind, bench.group).names("w")
    blocks = Blocks(*(bench.parameters[name] for name in names), kind)
    right = exact(blocks, (256, 256))
    y, x = (torch.empty(1, 256, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    bench.ops.store(bench.ops.linear(x, weight), y)
    binding = FusedBinding(bench.ops, nvrtc.program(bench.ops.source(), DEVICE))
    for column in range(256):
        x.zero_()[0, column] = 1
        binding.run()
        assert torch.equal(y[0], right[:, column].to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 16, 40])
def test_norm_gate_and_sum_around_products(rows: int, kind: Any) -> None:
    bench = Bench(kind, rows, torch.bfloat16)
    ops, width, inner = bench.ops, 512, 768
    stream = ops._stream(width)
    stream.tensor.copy_(bench.noise(rows, width, dtype=torch.float32))
    before = stream.tensor.double()
    normed = ops.rms_norm(stream, bench.vector("norm", width), 1e-6)
    gate = ops.activation(ops.linear(normed, bench.weight("wi_0", width, inner)), "gelu_new")
    hidden = ops.multiply(gate, ops.linear(normed, bench.weight("wi_1", width, inner)))
    ops._added(stream, ops.linear(hidden, bench.weight("wo", inner, width)))
    bench.run()
    own = {name: value.double() for name, value in bench.parameters.items()}
    x = before * torch.rsqrt(before.square().mean(-1, keepdim=True) + 1e-6) * own["norm"]
    first, second, last = (own[f"exact {name}"] for name in ("wi_0", "wi_1", "wo"))
    gelu = torch.nn.functional.gelu(x @ first.T, approximate="tanh")
    right = (gelu * (x @ second.T)) @ last.T
    distance = (stream.tensor.double() - before - right).norm() / right.norm()
    assert distance <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 9, 33])
def test_float32_weights_beside_float16_activations(rows: int, kind: Any) -> None:
    """As T5's ``wo`` is in float16: what is made of it has scales in float32."""
    bench = Bench(kind, rows, torch.float16, wide=torch.float32)
    stream = bench.ops._stream(128)
    stream.tensor.zero_()
    x, weight = bench.noise(rows, 512), bench.weight("wo", 512, 128)
    bench.ops._added(stream, bench.ops.wide_linear(x, weight))
    bench.run()
    bench.check(stream.tensor, x.double() @ bench.parameters["exact wo"].T)


SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 512}
CONFIGS: dict[str, tuple[str, Any]] = {
    "T5": (
        "T5ForConditionalGeneration",
        lambda: T5Config(
            **{"d_model": 256, "d_kv": 64, "d_ff": 512, "num_heads": 4, "num_layers": 2},
            **{"vocab_size": 501, "decoder_start_token_id": 0},
        ),
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        lambda: GPT2Config(
            **{"n_embd": 256, "n_head": 4, "n_layer": 2, "vocab_size": 501},
            **{"bos_token_id": 0, "eos_token_id": 0},
        ),
    ),
    "BART": (
        "BartForConditionalGeneration",
        lambda: BartConfig(
            **{"d_model": 256, "vocab_size": 501},
            **{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in SIDES.items()},
            forced_eos_token_id=None,
        ),
    ),
}


def pair(family: str, kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A Fast model with weights of fewer bits, and a stock one in float64 with what they stand
    for: what the Fast model's first call has made of its parameters tells which."""
    import transformers

    stock, config = CONFIGS[family][0], CONFIGS[family][1]()
    config.tie_word_embeddings = False  # T5Config takes no such argument
    torch.manual_seed(0)
    fast = getattr(fastgen, f"Fast{stock}")(copy.deepcopy(config)).eval()
    for parameter in fast.parameters():
        parameter.data *= 2 if parameter.ndim == 2 else 1
    fast = fast.to(DEVICE, dtype)
    fast.engine_options = {"weights": kind}
    generate(fast, 1, 2)
    exact_model = getattr(transformers, stock)(config).eval().to(DEVICE, torch.float64)
    exact_model.load_state_dict(fast.state_dict())
    weights = dict(exact_model.named_parameters())
    changed = 0
    for prefix, part in fast.named_modules():
        for (name, form), made in getattr(part, "_made", {}).items():
            weight = weights[f"{prefix}.{name}".lstrip(".")]
            shape = weight.T.shape if form.transposed else weight.shape
            whole = exact(made.blocks, tuple(shape))
            weight.data.copy_(whole.T if form.transposed else whole)
            changed += 1
    assert changed >= 2 * 4 + 1  # the decoder's products, and the head
    return fast, exact_model


def generate(model: Any, rows: int, new_tokens: int, **kwargs: Any) -> Any:
    """What follows a prompt, or hidden states: an encoder may round its activations as well."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 500, (rows, 12), generator=generator).to(DEVICE)
    hidden = torch.randn(rows, 12, 256, generator=generator).bfloat16().to(DEVICE, model.dtype)
    if model.config.is_encoder_decoder:
        kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=hidden)
    else:
        kwargs["input_ids"] = ids
    kwargs |= {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": 501}
    kwargs |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    return model.generate(attention_mask=torch.ones_like(ids), **kwargs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 24])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_models_compute_with_what_their_weights_stand_for(
    family: str, dtype: torch.dtype, rows: int, kind: str
) -> None:
    fast, exact_model = pair(family, kind, dtype)
    ours, right = (generate(model, rows, 12) for model in (fast, exact_model))
    decoder = fast._current_engine()
    assert all(bucket.fused for bucket in decoder.pool.idle())
    eps, compared = torch.finfo(dtype).eps, torch.ones(rows, dtype=torch.bool, device=DEVICE)
    for step in range(12):  # for as long as both have chosen the same tokens
        theirs, found = right.logits[step][compared], ours.logits[step][compared].double()
        if not len(theirs):
            break
        assert float((found - theirs).norm() / theirs.norm()) <= 4 * eps
        at = ours.sequences.shape[1] - 12 + step
        same = ours.sequences[:, at] == right.sequences[:, at]
        margin = right.logits[step].topk(2).values.diff().abs().flatten()
        spread = 16 * eps * right.logits[step].std(-1)
        assert (same | ~compared | (margin < spread)).all()
        compared &= same


@torch.no_grad()
def test_beams_are_those_of_what_the_weights_stand_for() -> None:
    fast, exact_model = pair("T5", "int8", torch.bfloat16)
    ours, right = (generate(model, 2, 6, num_beams=4).sequences for model in (fast, exact_model))
    assert (ours == right).float().mean() >= 0.5  # near ties may fall otherwise


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_torchs_weights_may_go(family: str) -> None:
    """Of the decoder too, before its first step; later sizes find what was made of them."""
    kept, _ = pair(family, "int8", torch.bfloat16)
    fast = copy.deepcopy(kept)
    fast.engine_options = {"weights": "int8", "keep_torch_weights": False}
    for rows in (1, 5):
        ours, theirs = (generate(model, rows, 12).sequences for model in (fast, kept))
        assert torch.equal(ours, theirs)
    decoders = [name for name, p in fast.named_parameters() if isinstance(p, Gone)]
    assert len([name for name in decoders if "encoder." not in name]) >= 2 * 4


@torch.no_grad()
def test_a_step_over_a_past_of_its_own() -> None:
    fast, exact_model = pair("GPT-2", "int4", torch.bfloat16)
    ids = torch.randint(3, 500, (2, 9), device=DEVICE)
    past = fast(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1)[CACHE]
    ours = fast(input_ids=ids[:, -1:], **{CACHE: past}, use_cache=True).logits[:, -1].double()
    right = exact_model(input_ids=ids).logits[:, -1]
    assert float((ours - right).norm() / right.norm()) <= 4 * torch.finfo(torch.bfloat16).eps
