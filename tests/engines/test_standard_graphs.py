"""The graphs that TensorRT gets compute what the stock models do: every variant of every family.

TensorRT itself needs a GPU that it knows. Here the same bytes run on the CPU: float32 and float16
by ONNX Runtime, bfloat16 by onnx's reference evaluator.
"""

import copy
import functools
import tempfile
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch

from fastgen.engine_cache import Artifact
from fastgen.engines import choice
from fastgen.engines.weight_inputs import weights_as_inputs
from fastgen.graphs.graph import Graph
from fastgen.hf.contract import CACHE
from fastgen.target import Target, onnxruntime_tensorrt, tensorrt
from tests.configs import VARIANTS, Pair, build_pair, build_stock, fast_class, stock_class
from tests.helpers import CLOSE, tokens
from tests.modes import MODES
from tests.standard import Reference, cpu_target
from tests.test_parity import outcome

LENGTHS = (9, 4, 1)  # of the sources, again and again
PROMPT, STEPS = 4, 4


@pytest.fixture(autouse=True)
def on_standard_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast models compile for the CPU what they compile for TensorRT."""

    def choose(options: Any, device: torch.device, dtype: torch.dtype) -> Any:
        return cpu_target(str(dtype).removeprefix("torch."))

    real = choice.backend
    choices = {"onnx reference": Reference()}
    monkeypatch.setattr("fastgen.hf.building.choose_target", choose)
    monkeypatch.setattr(choice, "backend", lambda name: choices.get(name) or real(name))


@functools.cache
def pair(name: str) -> Pair:
    """Both models in float32; the Fast one is this module's own, and keeps its engines."""
    both = build_pair(name)
    return Pair(both.stock, copy.deepcopy(both.fast))


def narrow_pair(name: str, dtype: torch.dtype, all_narrow: bool) -> Pair:
    """Both models as loaded in ``dtype``; ``all_narrow`` casts what transformers keeps wide too."""
    with tempfile.TemporaryDirectory() as folder:
        build_stock(name).save_pretrained(folder)
        models = [
            kind(name).from_pretrained(folder, dtype=dtype).eval()
            for kind in (stock_class, fast_class)
        ]
    return Pair(*(model.to(dtype) if all_narrow else model for model in models))


def sources(rows: int = 3) -> dict[str, torch.Tensor]:
    """A ragged batch: token ids [rows, 9] padded on the right, and their mask."""
    lengths = torch.tensor(LENGTHS).repeat(rows // len(LENGTHS))
    keep = torch.arange(LENGTHS[0]) < lengths[:, None]
    return {"input_ids": tokens(rows, LENGTHS[0], seed=1) * keep, "attention_mask": keep.long()}


@torch.no_grad()
def decode(model: Any, chunks: tuple[int, ...], rows: int = 3) -> tuple[torch.Tensor, Any]:
    """Logits [rows, sum(chunks), V] of fixed tokens given chunk by chunk, and the KV cache."""
    call, ids = sources(rows), tokens(rows, sum(chunks), seed=2)
    encoded = model.get_encoder()(**call)
    call = {"encoder_outputs": encoded, "attention_mask": call["attention_mask"]}
    past, found, start = None, [], 0
    for chunk in chunks:
        new = ids[:, start : start + chunk]
        output = model(**call, decoder_input_ids=new, **{CACHE: past}, use_cache=True)
        past, start = output[CACHE], start + chunk
        found.append(output.logits.clone())
    return torch.cat(found, dim=1), past


def served(model: Any) -> Any:
    """The decoder that computed, on standard graphs."""
    assert model._refusal is None and model.get_encoder()._refusal is None
    assert not model._engine.target.contrib
    return model._engine


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_steps_compute_what_the_stock_model_does(name: str) -> None:
    """Logits and the KV buffers, updated in place."""
    models = pair(name)
    # one token at a time: stock UMT5 of transformers 5.17 is not causal within a prompt
    expected, stock_past = decode(models.stock, (1,) * (PROMPT + STEPS))
    found, past = decode(models.fast, (PROMPT,) + (1,) * STEPS)
    torch.testing.assert_close(found, expected, **CLOSE)
    target, bucket = served(models.fast).target, past.bucket
    assert bucket.target == target == cpu_target("float32")
    caches = past.self_attention_cache.layers, stock_past.self_attention_cache.layers
    for mine, stock in zip(*caches, strict=True):
        torch.testing.assert_close(mine.keys, stock.keys, **CLOSE)
        torch.testing.assert_close(mine.values, stock.values, **CLOSE)
        assert mine.keys.shape[2] == PROMPT + STEPS


@pytest.mark.parametrize("name", VARIANTS)
def test_the_encoder_computes_what_the_stock_encoder_does(name: str) -> None:
    call = sources()
    with torch.no_grad():
        expected, found = (m.get_encoder()(**call)[0] for m in (pair(name).stock, pair(name).fast))
    shown = call["attention_mask"].bool()  # what padding computes, nothing reads
    torch.testing.assert_close(found[shown], expected[shown], **CLOSE)


#: Greedy decoding, sampling and beams (queries of one row under a slot mask), prompts, padding on
#: both sides, and more tokens than the first bucket has slots.
GENERATED = (
    *("greedy", "sample", "ragged left", "ragged right", "beam scores", "ragged beams"),
    *("decoder prompt", "beams prompted", "longer than a bucket", "beams longer than a bucket"),
)


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for mode in GENERATED for name in MODES[mode].variants]
)
def test_generate_gives_the_same_tokens(name: str, mode: str) -> None:
    models = pair(name)
    expected, found = outcome(models.stock, name, mode), outcome(models.fast, name, mode)
    assert found["sequences"].tolist() == expected["sequences"].tolist()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-4)
    served(models.fast)


@pytest.mark.parametrize("all_narrow", [True, False], ids=["narrow", "wide kept"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_narrow_types_are_no_farther_from_float32_than_stock(
    name: str, dtype: torch.dtype, all_narrow: bool
) -> None:
    rows = 48  # few rows differ by chance: rounding is amplified by what the weights happen to be
    exact, _ = decode(build_pair(name).stock, (1,) * (PROMPT + 2), rows)
    models = narrow_pair(name, dtype, all_narrow)
    chunks = (1,) * (PROMPT + 2), (PROMPT, 1, 1)
    stock, fast = (
        (decode(model, chunk, rows)[0].float() - exact).square().mean().sqrt()
        for model, chunk in zip((models.stock, models.fast), chunks, strict=True)
    )
    served(models.fast)
    # onnx's evaluator rounds softmax to bfloat16 at each of its steps
    assert fast <= 1.2 * stock, f"RMS error {fast:.4f}, stock {stock:.4f}"


@pytest.mark.parametrize("all_narrow", [True, False], ids=["narrow", "wide kept"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@torch.no_grad()
def test_narrow_hidden_states_are_what_stock_gives(dtype: torch.dtype, all_narrow: bool) -> None:
    """In its dtypes, and no farther from float32."""
    models = narrow_pair("t5-1.1", dtype, all_narrow)
    call = sources(48) | {"output_hidden_states": True}
    call["decoder_input_ids"] = tokens(48, 5, seed=2)
    wide = build_pair("t5-1.1").stock
    exact, stock, fast = (model(**call) for model in (wide, models.stock, models.fast))
    served(models.fast)
    seen = call["attention_mask"].bool()
    for side, rows in (("encoder", seen), ("decoder", torch.ones(48, 5, dtype=torch.bool))):
        states = [output[f"{side}_hidden_states"] for output in (exact, stock, fast)]
        assert [s.dtype for s in states[2]] == [s.dtype for s in states[1]]
        for right, *others in zip(*states, strict=True):
            errors = [(s.float() - right)[rows].square().mean().sqrt() for s in others]
            assert errors[1] <= 1.2 * errors[0]


@pytest.mark.parametrize("name", ["t5-1.0", "t5-1.1", "umt5"])
def test_attention_as_products_gives_the_same_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime's TensorRT provider gets it."""
    target = replace(onnxruntime_tensorrt("float32"), device="cpu", backend="onnxruntime")
    monkeypatch.setattr("fastgen.hf.building.choose_target", lambda *_: target)
    models = Pair(build_pair(name).stock, copy.deepcopy(build_pair(name).fast))
    found, _ = decode(models.fast, (PROMPT,) + (1,) * STEPS)
    torch.testing.assert_close(found, decode(models.stock, (1,) * (PROMPT + STEPS))[0], **CLOSE)
    for mode in ("ragged right", "ragged beams"):
        expected, found = outcome(models.stock, name, mode), outcome(models.fast, name, mode)
        assert found["sequences"].tolist() == expected["sequences"].tolist()
    assert not served(models.fast).target.attends


# What TensorRT reads


def graphs_of(model: Any, target: Target, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The ONNX bytes that a Fast model compiles for a Target, by the graph's name."""
    found: dict[str, bytes] = {}  # with weights as inputs, as TensorRT gets them

    class Kept(Reference):
        def compile(self, graph: Graph, title: str, *_: Any) -> Artifact:
            found[title] = weights_as_inputs(graph)
            return super().compile(graph)

    monkeypatch.setattr("fastgen.hf.building.choose_target", lambda *_: target)
    monkeypatch.setattr(choice, "backend", lambda name: Kept())
    model = copy.deepcopy(model)
    model.engine_options = {"disk_cache": False, "fused_kernels": False}
    model.compile_engine()
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_compared_here_is_what_tensorrt_reads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte; and it is sound ONNX without other domains."""
    fast = build_pair(name).fast
    here = graphs_of(fast, cpu_target("float32"), monkeypatch)
    assert len(here) == 3
    for onnx_bytes in here.values():
        model = onnx.load_from_string(onnx_bytes)
        assert {o.domain: o.version for o in model.opset_import} == {"": 24}
        onnx.checker.check_model(model, full_check=True)
    for backend in ("tensorrt", "tensorrt-rtx"):
        assert graphs_of(fast, tensorrt("float32", backend), monkeypatch) == here
