"""The fused kernels against ONNX Runtime's step in the same dtype and in float32."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import T5Config, UMT5Config

from fastgen import FastT5ForConditionalGeneration, FastUMT5ForConditionalGeneration
from fastgen.engines.fused import FusedEngine, supports
from fastgen.engines.fused_ops import NotFused
from fastgen.kv_cache import Bucket, BucketSize

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
    "eight beams": ({"feed_forward_proj": "gelu"}, BucketSize(1, 8, 512, 32)),
    "head size 32": ({"d_kv": 32, "num_heads": 3}, BucketSize(2, 1, 64, 32)),
    "head size 64": ({"d_kv": 64, "num_heads": 2}, BucketSize(1, 3, 192, 32)),
    "head size 128": ({"d_kv": 128, "num_heads": 2}, BucketSize(1, 4, 256, 32)),
    "odd sizes": ({"d_model": 88, "d_ff": 200, "vocab_size": 381}, BucketSize(2, 2, 64, 32)),
    "wide": ({"d_model": 768, "d_ff": 3072}, BucketSize(1, 1, 64, 32)),
    "wide, beams": ({"d_model": 1024, "d_ff": 2816} | GATED, BucketSize(1, 4, 256, 32)),
    "long": ({}, BucketSize(1, 1, 4096, 2048)),
    "large vocabulary": ({"vocab_size": 32100}, BucketSize(1, 4, 256, 32)),
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
    decoder = model._current_engine()
    bucket = Bucket(decoder.shape, decoder.target, DEVICE, size)
    generator = torch.Generator(DEVICE).manual_seed(1)
    length = size.slots // size.queries * 5 // 8
    bucket.self_kv.zero_()
    filled = bucket.filled(bucket.self_kv, length * size.queries)
    filled.copy_(torch.randn(filled.shape, generator=generator, device=DEVICE).bfloat16())
    hidden = torch.randn(
        size.batch, size.sources - 3, model.config.d_model, generator=generator, device=DEVICE
    ).bfloat16()
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=DEVICE)
    mask[-1, size.sources // 2 :] = 0
    with torch.no_grad():
        decoder.fill_cross(bucket, hidden.to(bucket.dtype), mask)
    tensors = bucket.tensors
    ids = torch.randint(
        *(2, model.config.vocab_size, (size.batch, size.queries)),
        generator=generator,
        device=DEVICE,
    )
    tensors["input_ids"].copy_(ids)
    tensors["query_positions"].fill_(length)
    tensors["first_slot"].fill_(length * size.queries)
    if size.queries > 1:
        tensors["slot_mask"] = beam_mask(size, length, generator).to(bucket.dtype)
    return bucket


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


def run_both(model: Any, size: BucketSize) -> tuple[Bucket, Bucket]:
    """One step on ONNX Runtime's engine, and one on the fused kernels, from equal buffers."""
    decoder = model._current_engine()
    stock, fused = filled_bucket(model, size), filled_bucket(model, size)
    decoder.decoder(size.queries > 1).bind(stock.tensors).run()
    root = model._decoder_root()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    engine = FusedEngine(root, root.decode, decoder.target, parameters)
    assert supports(decoder.target, DEVICE, *size[:3], model.config.d_kv) is None
    with torch.no_grad():
        engine.bind(fused.tensors).run()
    torch.cuda.synchronize()
    return stock, fused


def errors(bucket: Bucket, exact: Bucket) -> list[float]:
    """Relative errors of the logits and of the KV buffers."""
    pairs = [(bucket.tensors["logits"], exact.tensors["logits"]), (bucket.self_kv, exact.self_kv)]
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float16, float wo", "float32"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_as_exact_as_onnxruntime(case: str, dtype: str) -> None:
    changes, size = CASES[case]
    name, _, float_wo = dtype.partition(", ")
    stock, fused = run_both(build_model(changes, getattr(torch, name), bool(float_wo)), size)
    exact, _ = run_both(build_model(changes, torch.float32), size)
    for theirs, ours in zip(errors(stock, exact), errors(fused, exact), strict=True):
        assert ours <= 1.1 * theirs + 1e-5


def test_unfilled_slots_are_never_read() -> None:
    model = build_model({}, torch.bfloat16)
    size = BucketSize(1, 1, 64, 32)
    bucket = filled_bucket(model, size)
    first = int(bucket.tensors["first_slot"][0])
    bucket.filled(bucket.self_kv, size.slots)[:, :, first:] = float("nan")
    root = model._decoder_root()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    target = model._current_engine().target
    with torch.no_grad():
        FusedEngine(root, root.decode, target, parameters).bind(bucket.tensors).run()
    assert bucket.tensors["logits"].isfinite().all()


def test_weights_are_read_in_place() -> None:
    model = build_model({}, torch.bfloat16)
    root = model._decoder_root()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    engine = FusedEngine(root, root.decode, model._current_engine().target, parameters)
    for name, pointer in engine.weight_pointers().items():
        assert pointer == parameters[name].data_ptr()


@pytest.mark.parametrize(
    ("changes", "size", "reason"),
    [
        ({"d_kv": 20, "num_heads": 3}, BucketSize(1, 1, 64, 32), "head size 20"),
        ({}, BucketSize(9, 1, 64, 32), "9 rows"),
        ({}, BucketSize(1, 8, 8192, 32), "8192 slots"),
    ],
)
def test_refuses_sizes(changes: Mapping[str, Any], size: BucketSize, reason: str) -> None:
    model = build_model(changes, torch.bfloat16)
    target = model._current_engine().target
    assert reason in str(supports(target, DEVICE, *size[:3], model.config.d_kv))


def test_bind_refuses_rows_of_weights_that_are_not_aligned() -> None:
    model = build_model({"d_ff": 100}, torch.bfloat16)
    bucket = filled_bucket(model, BucketSize(1, 1, 64, 32))
    root = model._decoder_root()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    engine = FusedEngine(root, root.decode, model._current_engine().target, parameters)
    with pytest.raises(NotFused, match="multiples of 8"):
        engine.bind(bucket.tensors)
