"""The fused kernels against torch, in the same dtype and in float64."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import T5Config, UMT5Config

from fastgen import FastT5ForConditionalGeneration, FastUMT5ForConditionalGeneration
from fastgen.engines.fused.engine import FusedEngine, supports
from fastgen.engines.fused.ops import NotFused
from fastgen.execution.bucket import Bucket, BucketSize
from fastgen.target import onnxruntime_cuda
from tests.gpu.torch_ops import TorchOps

pytestmark = pytest.mark.cuda

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
#: Config fields, and the step's batch, queries, slots and sources.
CASES: dict[str, tuple[dict[str, Any], BucketSize]] = {
    "relu": ({}, BucketSize(1, 1, 64, 32)),
    "gated": (GATED, BucketSize(1, 1, 64, 32)),
    "beams": (GATED, BucketSize(1, 4, 256, 32)),
    "three rows": ({}, BucketSize(3, 1, 64, 64)),
    "two rows of four beams": (GATED, BucketSize(2, 4, 128, 32)),
    "eight rows": ({"feed_forward_proj": "gated-silu"}, BucketSize(8, 1, 64, 96)),
    "sixteen rows": ({}, BucketSize(16, 1, 64, 32)),
    "three rows of four beams, gated": (GATED, BucketSize(3, 4, 128, 32)),
    "eight beams": ({"feed_forward_proj": "gelu"}, BucketSize(1, 8, 512, 32)),
    "head size 32": ({"d_kv": 32, "num_heads": 3}, BucketSize(2, 1, 64, 32)),
    "head size 64": ({"d_kv": 64, "num_heads": 2}, BucketSize(1, 3, 192, 32)),
    "head size 128": ({"d_kv": 128, "num_heads": 2}, BucketSize(1, 4, 256, 32)),
    "odd sizes": ({"d_model": 88, "d_ff": 200, "vocab_size": 381}, BucketSize(2, 2, 64, 32)),
    "wide": ({"d_model": 768, "d_ff": 3072}, BucketSize(1, 1, 64, 32)),
    "wide, beams": ({"d_model": 1024, "d_ff": 2816} | GATED, BucketSize(1, 4, 256, 32)),
    "long": ({}, BucketSize(1, 1, 4096, 2048)),
    "long, beams": ({"d_kv": 64}, BucketSize(1, 4, 4096, 512)),
    "long, head size 128": ({"d_kv": 128}, BucketSize(2, 1, 128, 256)),
    "wide, sixteen rows": ({"d_model": 1024, "d_ff": 4096} | GATED, BucketSize(16, 1, 64, 64)),
    "large vocabulary": ({"vocab_size": 32100}, BucketSize(1, 4, 256, 32)),
    "seventeen rows": ({}, BucketSize(17, 1, 64, 32)),
    "hundred rows, gated": (GATED, BucketSize(100, 1, 64, 96)),
    "many rows of three beams": ({}, BucketSize(48, 3, 192, 32)),
    "many rows of four beams": (GATED | {"num_heads": 9}, BucketSize(16, 4, 128, 64)),
    "many rows of eight beams": ({"d_kv": 64, "num_heads": 8}, BucketSize(20, 8, 256, 64)),
    "many wide rows": ({"d_model": 768, "d_kv": 128, "num_heads": 9}, BucketSize(16, 4, 512, 512)),
    "tables in every layer": ({"model_type": "umt5"} | GATED, BucketSize(2, 1, 64, 32)),
}
TINY = {
    "vocab_size": 384,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
DEVICE = torch.device("cuda", 0)


def build_model(changes: Mapping[str, Any], dtype: torch.dtype, float_wo: bool = False) -> Any:
    """A tiny model with the same random weights in every dtype; its own weights are bfloat16's, so
    that a float32 copy computes with the same numbers."""
    fields = TINY | {k: v for k, v in changes.items() if k != "model_type"}
    torch.manual_seed(0)
    if changes.get("model_type") == "umt5":
        model = FastUMT5ForConditionalGeneration(UMT5Config(**fields))
    else:
        model = FastT5ForConditionalGeneration(T5Config(**fields))
    for name, parameter in model.named_parameters():
        scale = 1.0 if "layer_norm" in name else 2 * parameter.shape[-1] ** -0.5
        noise = torch.randn_like(parameter) * scale * (0.3 if ".q." in name else 1.0)
        parameter.data = (noise + ("layer_norm" in name)).bfloat16().float()
    model = model.eval().to(DEVICE, dtype)
    for name, parameter in model.named_parameters():
        if float_wo and ".wo." in name:
            parameter.data = parameter.data.float()
    return model


def filled_bucket(model: Any, size: BucketSize) -> Bucket:
    """Buffers amid a sequence, with padded sources and, for beams, a mask over slots."""
    root, dtype = graph_root(model), model.dtype
    target = onnxruntime_cuda(str(dtype).removeprefix("torch."))
    bucket = Bucket(root.shape, target, DEVICE, size)
    tensors, generator = bucket.tensors, torch.Generator(DEVICE).manual_seed(1)

    def noise(*axes: int) -> torch.Tensor:  # the same numbers in every dtype
        return torch.randn(axes, generator=generator, device=DEVICE).bfloat16().to(dtype)

    length = size.slots // size.queries * 5 // 8
    filled = bucket.filled(bucket.self_kv.zero_(), length * size.queries)
    filled.copy_(noise(*filled.shape))
    mask = torch.ones(size.batch, size.sources, dtype=torch.int64, device=DEVICE)
    mask[-1, size.sources // 2 :] = 0
    hidden = noise(size.batch, size.sources, model.config.d_model)
    for name, value in root.cross(TorchOps(parameters(model), dtype), hidden, mask).items():
        tensors[name].copy_(value.expand_as(tensors[name]))
    vocabulary = model.config.vocab_size
    tensors["input_ids"].random_(2, vocabulary, generator=generator)
    tensors["query_positions"].fill_(length)
    tensors["first_slot"].fill_(length * size.queries)
    if size.queries > 1:
        tensors["slot_mask"] = beam_mask(size, length, generator).to(dtype)
    return bucket


def graph_root(model: Any) -> Any:
    """The family's graph modules, whose parameters carry the model's names."""
    root = model._decoder_root()
    for name, parameter in root.named_parameters():
        parameter.name, parameter._realized = name, True
    return root


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def beam_mask(size: BucketSize, length: int, generator: torch.Generator) -> torch.Tensor:
    """Each query sees one slot of every position, and at its own position only its own."""
    chosen = torch.randint(
        *(0, size.queries, (size.batch, 1, size.queries, size.slots // size.queries)),
        generator=generator,
        device=DEVICE,
    )
    chosen[..., length] = torch.arange(size.queries, device=DEVICE)
    visible = torch.nn.functional.one_hot(chosen, size.queries).flatten(-2) > 0
    return torch.where(visible, 0.0, float("-inf"))


def run_fused(model: Any, bucket: Bucket) -> None:
    engine = fused_engine(model, bucket)
    assert supports(bucket.target, DEVICE, *bucket.size[:3], model.config.d_kv) is None
    engine.bind(bucket.tensors).run()


def fused_engine(model: Any, bucket: Bucket) -> FusedEngine:
    root = model._decoder_root()
    return FusedEngine(root, bucket.target, parameters(model))


def run_torch(model: Any, bucket: Bucket, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and new KV buffers of a step in plain torch, computed in ``dtype``."""
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in bucket.tensors.items()
    }
    kv = bucket.self_kv.to(dtype, copy=True)
    tensors |= dict(zip(bucket.shape.kv_names("self"), kv.flatten(-2).unbind(0), strict=True))
    logits = graph_root(model).decode(TorchOps(parameters(model), dtype), **tensors)["logits"]
    return logits, kv


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float16, float wo", "float32"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_as_exact_as_torch(case: str, dtype: str) -> None:
    changes, size = CASES[case]
    name, _, float_wo = dtype.partition(", ")
    model = build_model(changes, getattr(torch, name), bool(float_wo))
    bucket = filled_bucket(model, size)
    exact = run_torch(model, bucket, torch.float64)
    plain = run_torch(model, bucket, model.dtype)
    run_fused(model, bucket)
    fused = bucket.tensors["logits"], bucket.self_kv
    for right, theirs, ours in zip(exact, plain, fused, strict=True):
        # Which order of sums and roundings is nearer is chance, in tiny models above all
        allowed = 1.25 * error(theirs, right) + 2 * torch.finfo(model.dtype).eps + 2e-6
        assert error(ours, right) <= allowed


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


@torch.no_grad()
def test_unfilled_slots_are_never_read() -> None:
    model = build_model({}, torch.bfloat16)
    bucket = filled_bucket(model, BucketSize(1, 1, 64, 32))
    first = int(bucket.tensors["first_slot"][0])
    bucket.self_kv[:, :, first:] = float("nan")
    run_fused(model, bucket)
    assert bucket.tensors["logits"].isfinite().all()


@pytest.mark.parametrize("rows", [1, 32])
@torch.no_grad()
def test_float16_stays_finite_where_sums_overflow_it(rows: int) -> None:
    model = build_model(GATED, torch.float16)
    for name, parameter in model.named_parameters():
        if ".wo." in name:
            parameter.mul_(3000)
    bucket = filled_bucket(model, BucketSize(rows, 1, 64, 32))
    run_fused(model, bucket)
    exact, _ = run_torch(model, bucket, torch.float64)
    assert error(bucket.tensors["logits"], exact) < 0.01


def test_weights_are_read_in_place() -> None:
    model = build_model({}, torch.bfloat16)
    engine = fused_engine(model, filled_bucket(model, BucketSize(1, 1, 64, 32)))
    for name, pointer in engine.weight_pointers().items():
        assert pointer == parameters(model)[name].data_ptr()


@pytest.mark.parametrize(
    ("changes", "size", "reason"),
    [
        ({"d_kv": 20, "num_heads": 3}, BucketSize(1, 1, 64, 32), "head size 20"),
        ({}, BucketSize(513, 1, 64, 32), "513 rows"),
        ({}, BucketSize(1, 1, 16384, 32), "16384 slots"),
    ],
)
def test_refuses_sizes(changes: Mapping[str, Any], size: BucketSize, reason: str) -> None:
    head_size = (TINY | changes)["d_kv"]
    assert reason in str(supports(onnxruntime_cuda("bfloat16"), DEVICE, *size[:3], head_size))


@torch.no_grad()
def test_bind_refuses_rows_of_weights_that_are_not_aligned() -> None:
    model = build_model({"d_ff": 100}, torch.bfloat16)
    bucket = filled_bucket(model, BucketSize(1, 1, 64, 32))
    with pytest.raises(NotFused, match="multiples of 8"):
        fused_engine(model, bucket).bind(bucket.tensors)
