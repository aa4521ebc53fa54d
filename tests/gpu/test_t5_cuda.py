"""T5 on the GPU: tokens and logits against the stock model, in every dtype.

``pytest tests/gpu`` runs all tests that need a GPU.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.configs import Pair, fast_class, stock_class
from tests.gpu.models import (
    DEVICE,
    DTYPES,
    MEDIUM,
    cuda_copies,
    cuda_pair,
    decoded,
    error,
    fast_of,
    ids,
    mask,
    medium_stock,
    reference,
)
from tests.helpers import CAUSAL

pytestmark = pytest.mark.cuda

NAMES = ("t5-1.0", "t5-1.1", "flan", "mt5", "umt5", "t5-wide-heads", "t5-shallow-decoder")
#: Given several decoder tokens at once, stock UMT5 was not causal before transformers 5.23.
SEVERAL_TOKENS = tuple(name for name in NAMES if name != "umt5" or name in CAUSAL)
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3},
    "beams": {"num_beams": 4},
    "beam sample": {"num_beams": 3, "do_sample": True},
    "several of a row": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 8},
}


def generate(model: Any, **arguments: Any) -> list[list[int]]:
    """Tokens of a ragged batch, after seeding."""
    call = {"attention_mask": mask(3, 12), "max_new_tokens": 14, **arguments}
    torch.manual_seed(0)
    return model.generate(ids(3, 12), **call).tolist()


# float32: the same tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_the_stock_model(name: str, mode: str) -> None:
    pair = cuda_pair(name)
    path = pair.fast.explain(input_ids=ids(3, 12), **MODES[mode]).path
    assert path != "torch"
    stock = dict(MODES[mode])
    if pair.stock.config.num_decoder_layers != pair.stock.config.num_layers:
        stock["use_cache"] = False  # its own KV cache is sized by the encoder's layers
    assert generate(pair.fast, **MODES[mode]) == generate(pair.stock, **stock)


@pytest.mark.parametrize("mode", ["greedy", "sample", "beams"])
def test_the_hf_loop_gives_the_same_tokens(mode: str) -> None:
    pair = cuda_copies()
    pair.fast.engine_options = {"fast_loop": False}
    assert pair.fast.explain(input_ids=ids(3, 12), **MODES[mode]).path == "HF loop"
    assert generate(pair.fast, **MODES[mode]) == generate(pair.stock, **MODES[mode])


@pytest.mark.parametrize("name", SEVERAL_TOKENS)
def test_float32_logits(name: str) -> None:
    pair = cuda_pair(name)
    call = {
        "input_ids": ids(3, 12),
        "attention_mask": mask(3, 12),
        "decoder_input_ids": ids(3, 9, seed=2),
    }
    exact = reference(pair.stock, call)
    torch.testing.assert_close(decoded(pair.fast, call).double().cpu(), exact, rtol=1e-4, atol=2e-3)


# bfloat16 and float16: as near to the exact values as the stock model


def half_call() -> dict[str, torch.Tensor]:
    return {
        "input_ids": ids(8, 48, 512),
        "attention_mask": mask(8, 48),
        "decoder_input_ids": ids(8, 24, 512, seed=2),
    }


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    "fields",
    [
        {"feed_forward_proj": "relu"},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"feed_forward_proj": "gated-silu", "d_kv": 32, "num_heads": 6},
    ],
    ids=["1.0", "1.1", "silu"],
)
def test_logits_are_no_farther_from_exact_than_stock(
    dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    stock = medium_stock(**fields).to(DEVICE, dtype)
    fast, call = fast_of(stock, dtype), half_call()
    with torch.no_grad():
        assert fast.refusal(**call) is None
        whole = fast(**call).logits
        exact = reference(stock, call)
        theirs = error(stock(**call).logits, exact)
    assert whole.dtype == dtype
    assert error(whole, exact) <= 1.25 * theirs
    assert error(decoded(fast, call), exact) <= 1.25 * error(decoded(stock, call), exact)


@pytest.mark.parametrize("name", ["t5-1.1", "mt5"])
def test_float16_as_stock_loads_it_with_float32_wo(name: str, tmp_path: Path) -> None:
    """Stock keeps ``wo`` in float32 when it loads a checkpoint in float16."""
    cuda_copies(name).stock.cpu().save_pretrained(tmp_path)
    stock = stock_class(name).from_pretrained(tmp_path, dtype=torch.float16).to(DEVICE)
    fast = fast_class(name).from_pretrained(tmp_path, dtype=torch.float16).to(DEVICE)
    wide = {n for n, p in stock.named_parameters() if p.dtype == torch.float32}
    assert wide == {n for n, p in fast.named_parameters() if p.dtype == torch.float32}
    call = {"input_ids": ids(8, 20), "decoder_input_ids": ids(8, 12, seed=2)}
    with torch.no_grad():
        assert fast.refusal(**call) is None
    exact = reference(stock, call)
    assert error(decoded(fast, call), exact) <= 1.25 * error(decoded(stock, call), exact)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["t5-1.0", "t5-1.1", "umt5"])
def test_tokens_differ_only_at_near_ties(name: str, dtype: torch.dtype) -> None:
    """Each row follows the exact model's choices up to one whose margin is within the error."""
    pair = cuda_copies(name, dtype)
    call = {"attention_mask": mask(3, 12), "max_new_tokens": 14, "do_sample": False}
    found = pair.fast.generate(ids(3, 12), **call)
    prompt = {"input_ids": ids(3, 12), "attention_mask": mask(3, 12)}
    exact = reference(pair.stock, prompt | {"decoder_input_ids": found[:, :-1]})
    logits = decoded(pair.fast, prompt | {"decoder_input_ids": found[:, :-1]}, prefill=1)
    slack = 2 * (logits.double().cpu() - exact).abs().amax(-1)
    chosen = exact.gather(-1, found.cpu()[:, 1:, None])[..., 0]
    open_ = (found[:, :-1].cpu() == 1).cumsum(-1) == 0  # rows that have not ended
    assert (exact.amax(-1) - chosen <= slack)[open_].all()


# float16 must not overflow


def scaled(name: str, part: str, factor: float) -> Pair:
    """A model whose weights of one kind are larger, in float16 on the GPU."""
    pair = cuda_copies(name)
    for model in (pair.stock, pair.fast):
        for key, parameter in model.named_parameters():
            if key.endswith(part):
                parameter.data.mul_(factor)
        assert max(p.abs().max() for p in model.parameters()) < torch.finfo(torch.float16).max
        model.half()
    return pair


@pytest.mark.parametrize(
    ("name", "part", "factor"),
    [
        ("t5-1.0", ".wo.weight", 2e4),
        ("t5-1.1", ".wo.weight", 2e4),
        ("mt5", ".wo.weight", 2e4),
        ("t5-1.1", ".o.weight", 3e4),
    ],
)
def test_float16_does_not_overflow(name: str, part: str, factor: float) -> None:
    """Sublayer results beyond 65504: naive float16 is far off, the engine near to float32."""
    pair = scaled(name, part, factor)
    call = {"input_ids": ids(4, 12), "decoder_input_ids": ids(4, 9, seed=2)}
    exact = reference(pair.stock, call)
    naive = error(decoded(pair.stock, call), exact)
    assert not naive < 0.2, "these weights overflow nothing: the test shows nothing"
    found = decoded(pair.fast, call)
    assert found.isfinite().all()
    assert error(found, exact) < 0.05


@pytest.mark.parametrize(
    ("name", "part", "factor"), [("t5-1.0", ".wi.weight", 2e4), ("t5-1.1", ".wi_1.weight", 1e4)]
)
def test_float16_stays_finite_inside_the_feed_forward(name: str, part: str, factor: float) -> None:
    pair = scaled(name, part, factor)
    call = {"input_ids": ids(4, 12), "decoder_input_ids": ids(4, 9, seed=2)}
    assert reference(pair.stock, call).isfinite().all()
    assert not decoded(pair.stock, call).isfinite().all(), "stock .half() overflows here"
    assert decoded(pair.fast, call).isfinite().all()
    assert generate(pair.fast)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_only_padding_are_finite(dtype: torch.dtype) -> None:
    pair = cuda_copies("t5-1.1", dtype)
    visible = mask(3, 12)
    visible[1] = 0
    call = {
        "input_ids": ids(3, 12),
        "attention_mask": visible,
        "decoder_input_ids": ids(3, 9, seed=2),
    }
    found = decoded(pair.fast, call)
    assert found.isfinite().all()
    alone = {name: value[[0, 2]] for name, value in call.items()}
    exact = reference(pair.stock, alone)
    assert error(found[[0, 2]], exact) <= 1.25 * error(decoded(pair.stock, alone), exact) + 1e-5


# Changes of dtype and place


def test_moving_and_casting() -> None:
    pair = cuda_copies()
    expected = generate(pair.stock)
    assert generate(pair.fast) == expected
    pair.fast.half()
    assert "float16" in str(pair.fast._current_engine().target)
    generate(pair.fast)
    pair.fast.to("cpu", torch.float32)
    call = {"attention_mask": mask(3, 12).cpu(), "max_new_tokens": 14}
    rounded = copy.deepcopy(pair.stock).half().float().cpu()
    cpu = pair.fast.generate(ids(3, 12).cpu(), **call)
    assert cpu.tolist() == rounded.generate(ids(3, 12).cpu(), **call).tolist()
    pair.fast.load_state_dict(pair.stock.state_dict())
    pair.fast.to(DEVICE)
    assert generate(pair.fast) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_engines_read_the_parameters_of_the_model(dtype: torch.dtype) -> None:
    model = fast_of(medium_stock(), dtype)
    model.compile_engine()
    decoder = model._current_engine()
    for root, engine in (
        (model.encoder, model.encoder._current_engine().engine),
        (model, decoder.cross),
        (model, decoder.decoder(False, 64)),
    ):
        places = dict(root.named_parameters(remove_duplicate=False))
        pointers = engine.weight_pointers()
        assert pointers == {name: places[name].data_ptr() for name in pointers}
    assert MEDIUM["d_model"] == model.config.d_model


# Long runs


def test_a_long_source_and_a_long_target() -> None:
    """Encoder 2,048 and decoder 1,024, through every bucket on the way."""
    stock = medium_stock().to(DEVICE)
    fast = fast_of(stock, torch.float32)
    source = ids(1, 2048, 512)
    output = fast.generate(
        source,
        min_new_tokens=1024,
        max_new_tokens=1024,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences.shape == (1, 1025)
    with torch.no_grad():
        expected = stock(input_ids=source, decoder_input_ids=output.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_growing_past_buckets(beams: int) -> None:
    pair = cuda_copies()
    pair.fast.engine_options = {"min_bucket": 4}
    call = {"max_new_tokens": 40, "min_new_tokens": 40, "num_beams": beams}
    assert generate(pair.fast, **call) == generate(pair.stock, **call)
    prompt = {"input_ids": ids(3, 12), "decoder_input_ids": ids(3, 40, seed=2)}
    found = decoded(pair.fast, prompt, prefill=3)
    torch.testing.assert_close(found, decoded(pair.stock, prompt, 3), rtol=1e-4, atol=2e-3)
