"""Models of 16 bits on the CPU: their engines compute in float32, with the same weights.

What is expected is therefore the fp32 engine's tokens on the rounded weights, results that are no
farther from fp32 than stock's in 16 bits, and outputs in the dtypes that stock gives.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastgen
from fastgen.errors import WeightsGoneError
from fastgen.file_pages import FilePages, unwritten
from fastgen.hf.contract import CACHE
from fastgen.hf.stock import stock_class
from fastgen.registry import FAMILIES, Family
from tests.configs import EVERY, VARIANTS, Pair, build_pair, prompts
from tests.helpers import logits, refusal, sources, targets
from tests.modes import MODES, generate

VOCABULARY = 48
DTYPES = torch.bfloat16, torch.float16
BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
#: Every class in bfloat16, one of each family in float16.
CLASSES = [(f, task, "bfloat16") for f in FAMILIES.values() for task in f.tasks]
CLASSES += [(f, f.tasks[0], "float16") for f in FAMILIES.values()]
#: Every variant in bfloat16, one of each kind in float16.
GENERATED = [(name, "bfloat16") for name in EVERY]
GENERATED += [(name, "float16") for name in ("t5-1.1", "bart", "gpt2")]
MANY_MODES = "t5-1.1", "bart", "gpt2"


def models(name: str, dtype: torch.dtype, **options: Any) -> Pair:
    """Copies of a variant's models in a dtype."""
    pair = copy.deepcopy(build_pair(name))
    if options:
        pair.fast.engine_options = options
    return Pair(pair.stock.to(dtype), pair.fast.to(dtype))


def widened(model: Any) -> Any:
    """A float32 model with the same weights."""
    return copy.deepcopy(model).float()


def tensors(output: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The floating tensors of an output but for a KV cache's, by their place in it."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield path, output
    elif isinstance(output, dict):
        for name in output.keys() - {CACHE}:
            yield from tensors(output[name], f"{path}.{name}")
    elif isinstance(output, tuple | list):
        for index, part in enumerate(output):
            yield from tensors(part, f"{path}.{index}")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def call(model: Any, **more: Any) -> Any:
    """A forward of any class: token ids without padding, and the decoder's, if it has one."""
    ids = prompts("t5-1.1", rows=6) % VOCABULARY
    arguments: dict[str, Any] = {"input_ids": ids}
    kind = type(model).__qualname__
    if kind.endswith("MultipleChoice"):
        arguments["input_ids"] = ids[None]
    elif model.config.is_encoder_decoder and "EncoderModel" not in kind:
        # stock UMT5 of transformers 5.17 is not causal within several tokens
        arguments["decoder_input_ids"] = ids[:, :1]
        if kind.endswith(("Classification", "Answering")):
            ids[:, -1] = model.config.eos_token_id
            arguments["decoder_input_ids"] = None if "T5" not in kind else ids
    return model(**{k: v for k, v in (arguments | more).items() if v is not None})


def tiny(family: Family, task: str, dtype: torch.dtype) -> Pair:
    """Both models of a class, with the same random weights."""
    fast_type: Any = getattr(fastgen, family.class_name(task))
    stock_type: Any = stock_class(fast_type)
    names = dict(getattr(fastgen, family.class_name()).trial_config)
    names |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    config = stock_type.config_class(**names)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    stock, generator = stock_type(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stock.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale, middle = (parameter.shape[-1] ** -0.5, 0) if parameter.ndim > 1 else (0.2, 1)
            parameter.copy_(middle + scale * noise)
    fast = fast_type(stock.config).eval()
    fast.load_state_dict(stock.state_dict())
    return Pair(stock.to(dtype), fast.to(dtype))


@pytest.mark.parametrize(
    ("family", "task", "dtype"), CLASSES, ids=[f"{f.class_name(t)}-{d}" for f, t, d in CLASSES]
)
def test_no_farther_from_fp32_than_stock_in_its_dtypes(
    family: Family, task: str, dtype: str
) -> None:
    pair = tiny(family, task, BY_NAME[dtype])
    stock, fast = pair.stock, pair.fast
    given = {"output_hidden_states": True}
    if family.name == "GPT2" and task != "LMHeadModel":
        given["use_cache"] = False
    exact, expected, found = (call(model, **given) for model in (widened(stock), stock, fast))
    with torch.no_grad():
        assert "computed in float32" in str(fast.explain_forward())
    assert found.keys() == expected.keys()
    exact, expected, found = (dict(tensors(output)) for output in (exact, expected, found))
    assert {place: part.dtype for place, part in found.items()} == {
        place: part.dtype for place, part in expected.items()
    }
    for place, part in exact.items():
        bound = max(error(expected[place], part), torch.finfo(BY_NAME[dtype]).eps / 2)
        assert error(found[place], part) <= bound, place


@pytest.mark.parametrize(("name", "dtype"), GENERATED)
def test_generate_as_the_fp32_engine(name: str, dtype: str) -> None:
    fast: Any = models(name, BY_NAME[dtype]).fast
    reference = widened(fast)
    modes = "greedy", "beams", "sample", "ragged left", "prompt lookup", "hidden states"
    for mode in modes if name in MANY_MODES else ("beams",):
        if name not in MODES[mode].names:
            continue
        outputs = [generate(m, name, MODES[mode].arguments(m, name)) for m in (reference, fast)]
        assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist(), mode
        for place, part in tensors(outputs[1]):
            if "hidden_states" in place:
                assert part.dtype == BY_NAME[dtype], (mode, place)
    ids = prompts(name, rows=3)
    assert str(fast.explain(input_ids=ids)) == "fast loop, computed in float32"
    if name not in MANY_MODES:
        return
    expected = reference.generate(ids, max_new_tokens=8, num_beams=2)
    for options in ({"fast_loop": False}, {"check_fast_loop": True}):
        fast.engine_options = options
        assert torch.equal(fast.generate(ids, max_new_tokens=8, num_beams=2), expected)


def test_processors_see_unrounded_scores() -> None:
    """As stock's, they are float32; no two of them are equal, as bfloat16 would make them."""
    fast: Any = models("t5-1.1", torch.bfloat16).fast
    more = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    for options in ({}, {"fast_loop": False}):
        fast.engine_options = options
        first = fast.generate(sources(), **more).logits[0]
        assert first.dtype == torch.float32
        assert not torch.equal(first, first.bfloat16().float())


# What torch computes beside engines


def test_a_cache_goes_from_an_engine_to_torch_and_back() -> None:
    pair = models("t5-1.1", torch.bfloat16)
    exact, outputs = widened(pair.stock), []
    for model in (exact, pair.fast):
        past, steps = None, []
        for step, by_torch in enumerate((False, True, False, True)):
            ids = targets()[:, step : step + 1]
            more = {CACHE: past, "output_attentions": by_torch, "use_cache": True}
            with torch.no_grad():
                output = model(input_ids=sources(), decoder_input_ids=ids, **more)
            past = output[CACHE]
            steps.append(output.logits)
        outputs.append(torch.cat(steps, 1))
        assert past.self_attention_cache.layers[0].keys.dtype == model.dtype
        assert past.cross_attention_cache.layers[1].values.dtype == model.dtype
    assert error(outputs[1], outputs[0]) < 0.02


def test_edits_of_a_caches_keys_count() -> None:
    pair = models("gpt2", torch.bfloat16)
    ids, found = prompts("gpt2", rows=2), []
    for model in (widened(pair.fast), pair.fast):
        with torch.no_grad():
            past = model(ids, use_cache=True)[CACHE]
            past.layers[0].keys[:, :, 2].mul_(-3)
            found.append(model(ids[:, :1], use_cache=True, **{CACHE: past}).logits)
    assert error(found[1], found[0]) < 0.02


def test_copies_of_a_cache_go_on() -> None:
    fast: Any = models("gpt2", torch.bfloat16).fast
    ids = prompts("gpt2", rows=2)
    with torch.no_grad():
        past = fast(ids, use_cache=True)[CACHE]
        other = copy.deepcopy(past)
        found = [fast(ids[:, :1], use_cache=True, **{CACHE: p}).logits for p in (past, other)]
    assert torch.equal(*found)
    assert other.layers[0].keys.dtype == torch.bfloat16


def test_generate_whose_steps_torch_computes() -> None:
    """The encoder's hidden states reach torch in its own dtype."""
    pair = models("t5-1.1", torch.bfloat16)
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[0, 0] = 0
    more = {"decoder_input_ids": targets(), "decoder_attention_mask": mask, "max_new_tokens": 2}
    expected = pair.stock.generate(sources(), **more)
    with pytest.warns(fastgen.FallbackWarning, match="decoder_attention_mask hides tokens"):
        found = pair.fast.generate(sources(), **more)
    assert found.shape == expected.shape


def test_hidden_states_in_another_dtype_are_stocks_error() -> None:
    pair = models("t5-1.1", torch.bfloat16)
    hidden = torch.zeros(3, 9, 32)
    for model in (pair.stock, pair.fast):
        with pytest.raises(RuntimeError, match="dtype"):
            logits(model, encoder_outputs=(hidden,))


def test_training_is_torchs() -> None:
    pair = models("t5-1.1", torch.bfloat16)
    losses = []
    for model in (pair.stock, pair.fast):
        loss = model(input_ids=sources(), labels=targets()).loss
        loss.backward()
        losses.append((loss.detach(), model.lm_head.weight.grad))
    torch.testing.assert_close(losses[1], losses[0])
    with torch.no_grad():
        for model in (pair.stock, pair.fast):
            model.lm_head.weight -= model.lm_head.weight.grad
        assert refusal(pair.fast) is None
        expected = logits(widened(pair.stock))
        assert error(logits(pair.fast), expected) <= error(logits(pair.stock), expected)


def test_the_loss_is_in_stocks_dtype() -> None:
    for name in ("t5-1.1", "bart", "gpt2"):
        pair = models(name, torch.bfloat16)
        ids = prompts(name, rows=2)
        with torch.no_grad():
            losses = [m(input_ids=ids, labels=ids).loss for m in (pair.stock, pair.fast)]
        assert losses[0].dtype == losses[1].dtype
        torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)


# Weights


def scale(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def scale_through_data(model: Any) -> None:
    model.lm_head.weight.data.mul_(2)


def change_one_of_the_norm(model: Any) -> None:
    model.decoder.final_layer_norm.weight.data[3] *= -4


def change_the_encoder(model: Any) -> None:
    model.encoder.block[1].layer[1].DenseReluDense.wo.weight.data[3] *= -2


def change_a_table(model: Any) -> None:
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data[0] += 3


def load(model: Any) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})


EDITS = scale, scale_through_data, change_one_of_the_norm, change_the_encoder, change_a_table, load


@pytest.mark.parametrize("prepack", [0.0, 1.0])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_noticed(edit: Callable[[Any], None], prepack: float) -> None:
    fast: Any = models("t5-1.1", torch.bfloat16, prepack=prepack).fast
    before = logits(fast)
    edit(fast)
    found = logits(fast)
    assert not torch.equal(found, before)
    assert torch.equal(found, logits(widened(fast)).bfloat16())


def test_the_dtype_may_change() -> None:
    pair = copy.deepcopy(build_pair("t5-1.1"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float16):
        for model in (pair.stock, pair.fast):
            model.to(dtype)
        found = logits(pair.fast)
        assert found.dtype == dtype and refusal(pair.fast) is None
        wanted = logits(widened(pair.stock))
        step = torch.finfo(dtype).eps  # 16 bits may be rounded to either side
        torch.testing.assert_close(found, wanted.to(dtype), rtol=max(step, 1e-4), atol=5e-4)
        assert ("float32" in str(pair.fast.explain())) == (dtype != torch.float32)


def test_checkpoints_keep_their_dtype(tmp_path: Path) -> None:
    fast: Any = models("t5-1.1", torch.bfloat16).fast
    before = logits(fast)
    fast.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    loaded = type(fast).from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), before)
    weight = loaded.decoder.block[0].layer[0].SelfAttention.q.weight
    if unwritten([weight.detach()]):  # the kernel tells of edits
        kinds = {type(copy) for copy in loaded._copies}
        assert FilePages in kinds
    weight.data[3] *= -2
    found = logits(loaded)
    assert not torch.equal(found, before)
    assert torch.equal(found, logits(widened(loaded)).bfloat16())


def test_half_with_some_weights_in_float32(tmp_path: Path) -> None:
    """T5 loaded in float16 keeps its ``wo`` so, and hidden states between layers."""
    build_pair("t5-1.1").stock.save_pretrained(tmp_path)
    stock, fast = (
        kind.from_pretrained(tmp_path, dtype=torch.float16).eval()
        for kind in (type(build_pair("t5-1.1").stock), fastgen.FastT5ForConditionalGeneration)
    )
    assert {p.dtype for p in fast.parameters()} == {torch.float16, torch.float32}
    with torch.no_grad():
        calls = partial(call, output_hidden_states=True)
        found, expected, exact = (dict(tensors(calls(m))) for m in (fast, stock, widened(stock)))
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
    assert error(found[".logits"], exact[".logits"]) <= error(expected[".logits"], exact[".logits"])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["t5-1.0", "gpt2"])
def test_fewer_bits_are_made_of_sixteen(name: str, kind: str) -> None:
    fast: Any = models(name, torch.bfloat16, weights=kind).fast
    reference = widened(fast)
    ids = prompts(name, rows=2)
    assert str(fast.explain(input_ids=ids)) == f"fast loop, {kind} weights, computed in float32"
    found, expected = (m.generate(ids, max_new_tokens=6) for m in (fast, reference))
    assert torch.equal(found, expected)
    first = fast.decoder.block[0].layer[0].SelfAttention.q if name in VARIANTS else None
    if first is not None:  # nothing in float32 of what is read in fewer bits
        whole = [key for key, form in fast._made if form is None]
        assert "decoder.block.0.layer.0.layer_norm.weight" in whole
        assert "decoder.block.0.layer.0.SelfAttention.q.weight" not in whole


def test_copies_are_shared_and_end_with_the_engines() -> None:
    fast: Any = models("t5-1.0", torch.bfloat16).fast
    logits(fast)
    tied = "shared.weight", None
    made = fast.encoder._made["embed_tokens.weight", None], fast._made["lm_head.weight", None]
    assert made[0] is made[1], tied
    held = [weakref.ref(part.blocks) for part in fast._made.values()]
    logits(fast, output_hidden_states=True)  # another graph, over the same copies
    assert all(ref() is part.blocks for ref, part in zip(held, fast._made.values(), strict=False))
    del made
    fast.invalidate_engine()
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_torchs_weights_may_go() -> None:
    pair = models("t5-1.1", torch.bfloat16, keep_torch_weights=False)
    before = pair.stock.generate(sources(), max_new_tokens=3).shape
    weight: Any = pair.fast.decoder.block[0].layer[0].SelfAttention.q.weight
    memory = weakref.ref(weight.untyped_storage())
    expected = widened(pair.fast).generate(sources(), max_new_tokens=8)
    first = pair.fast.generate(sources(), max_new_tokens=8)
    gc.collect()
    assert memory() is None and before[0] == 3
    assert torch.equal(first, expected)
    assert torch.equal(pair.fast.generate(sources(), max_new_tokens=8), expected)
    # other graphs read the copies, too
    more = {"output_hidden_states": True, "return_dict_in_generate": True}
    found = pair.fast.generate(sources(), max_new_tokens=8, **more)
    assert torch.equal(found.sequences, expected)
    with pytest.raises(WeightsGoneError):
        pair.fast.state_dict()
