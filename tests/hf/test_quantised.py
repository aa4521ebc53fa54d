"""Weights of fewer bits in models: right results for every family, made once, never stale."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import fastgen
from fastgen.blockwise import Format, parse
from fastgen.engines import NoEngine
from fastgen.errors import WeightsGoneError
from fastgen.hf import quantised
from fastgen.hf.let_go import Gone, let_go
from fastgen.hf.quantised import Weights
from tests.configs import Pair, build_pair, prompts
from tests.helpers import logits, refusal, sources, targets
from tests.quantised import standing_for

KINDS = "int8", "int4"
#: Variants of each family, and those whose products have other shapes, scales and biases.
CASES = [(name, "int8") for name in ("t5-1.0", "t5-1.1", "umt5", "mt5", "bart", "gpt2-sizes")]
CASES += [(name, "int4") for name in ("t5-1.0", "bart-sizes", "gpt2")]


def with_weights(name: str, kind: str, **options: Any) -> Pair:
    """Copies of a variant's models, whose Fast one has weights of fewer bits."""
    pair = copy.deepcopy(build_pair(name))
    pair.fast.engine_options = {"weights": kind, **options}
    return pair


@torch.no_grad()
def call(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [rows, Q, V]."""
    # stock UMT5 of transformers 5.17 is not causal within several tokens
    queries = 1 if model.config.model_type == "umt5" else 5
    more = {"decoder_input_ids": ids[:, :queries]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def assert_most_rows_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A number that lies between two steps may be rounded to either, which the row shows."""
    difference = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (difference < 1e-4).float().mean() >= 0.75, difference
    assert (difference < 0.1).all(), difference


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_family_computes_with_rounded_weights(name: str, kind: str) -> None:
    pair = with_weights(name, kind)
    reference, ids = standing_for(pair.stock, kind), prompts(name, rows=8)
    expected = call(reference, ids)
    assert_most_rows_close(call(pair.fast, ids), expected)
    assert not torch.allclose(expected, call(pair.stock, ids), rtol=1e-3, atol=1e-3)
    arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert str(pair.fast.explain(**arguments)) == f"fast loop, {kind} weights"
    same = 0
    for row in ids[:4, None]:
        found, wanted = (m.generate(row, **arguments) for m in (pair.fast, reference))
        same += torch.equal(found, wanted)
    assert same >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_bert(kind: str) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    stock = BertForSequenceClassification(
        BertConfig(**config, vocab_size=96, intermediate_size=64)
    ).eval()
    fast = fastgen.FastBertForSequenceClassification(stock.config).eval()
    fast.load_state_dict(stock.state_dict())
    fast.engine_options = {"weights": kind}
    reference = standing_for(stock, kind, but="classifier")  # a head is stock code
    ids = torch.randint(3, 96, (8, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for hidden in (0, 4):
        mask[4:, 9 - hidden :] = 0
        with torch.no_grad():
            found, expected = (m(ids, attention_mask=mask).logits for m in (fast, reference))
            assert (
                str(fast.explain(input_ids=ids, attention_mask=mask)) == f"engine, {kind} weights"
            )
        assert_most_rows_close(found, expected)


# Edits


def double(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def double_through_data(model: Any) -> None:
    model.lm_head.weight.data.mul_(2)


def swap_through_data(model: Any) -> None:
    weight = model.decoder.block[0].layer[1].EncDecAttention.k.weight
    weight.data[:2] = weight.data[:2].flip(0)


def in_the_encoder(model: Any) -> None:
    model.encoder.block[1].layer[1].DenseReluDense.wo.weight.data[3] *= -2


def another_tensor(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).contiguous())


def load(model: Any) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


@pytest.mark.parametrize("prepack", [0.0, 0.25])
@pytest.mark.parametrize(
    "edit",
    [double, double_through_data, swap_through_data, in_the_encoder, another_tensor, load],
)
def test_edits_are_noticed(edit: Callable[[Any], None], prepack: float) -> None:
    pair = with_weights("t5-1.1", "int8", prepack=prepack)
    before = logits(pair.fast)
    for model in (pair.fast, pair.stock):
        edit(model)
    expected = logits(standing_for(pair.stock, "int8"))
    found = logits(pair.fast)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_other_weights_are_another_engine() -> None:
    pair = with_weights("t5-1.1", "int8")
    first = logits(pair.fast)
    pair.fast.engine_options = {"weights": "full"}
    torch.testing.assert_close(logits(pair.fast), logits(pair.stock), rtol=1e-4, atol=5e-4)
    pair.fast.engine_options = {"weights": "int8"}
    assert torch.equal(logits(pair.fast), first)


# Made once


def test_all_who_ask_share_what_was_made_while_somebody_holds_it() -> None:
    parameter = torch.nn.Parameter(torch.randn(8, 32))
    names = Format("int8", 32).names("w")
    one, other = (Weights({"w": parameter}, {}) for _ in range(2))
    assert one["w"] is parameter and list(one) == ["w"] and len(one) == 1
    assert one[names[0]].data_ptr() == one[names[0]].data_ptr() == other[names[0]].data_ptr()
    assert one[names[1]].data_ptr() == other[names[1]].data_ptr()
    made = quantised._all_made[parameter]
    assert len(made) == 1
    one.packed(names)
    assert len(made) == 1  # the other holds it
    other.made.clear()
    gc.collect()
    assert len(made) == 0


@pytest.mark.parametrize("edit", ["counted", "data", "moved"])
def test_what_was_made_of_other_numbers_is_made_anew(edit: str) -> None:
    parameter = torch.nn.Parameter(torch.randn(8, 32))
    name = Format("int8", 32).names("w")[1]
    kept = Weights({"w": parameter}, {})
    before = kept[name].clone()
    if edit == "counted":
        with torch.no_grad():
            parameter.mul_(2)
    elif edit == "data":
        parameter.data.mul_(2)
    else:
        parameter.data = 2 * parameter.data
    assert torch.equal(kept[name], before)  # whose engine looks at the weights itself
    assert torch.equal(Weights({"w": parameter}, {})[name], 2 * before)


def test_the_engine_lets_go_of_what_it_has_packed() -> None:
    model = with_weights("t5-1.1", "int8").fast
    logits(model)
    held = [*model._made.values(), *model.encoder._made.values()]
    assert held and all(made.blocks is None for made in held)
    pointers = model._engine.decoder(False, 64).weight_pointers()
    assert pointers and not any(map(parse, pointers))


# Weights that torch lets go


def light(name: str, kind: str = "int8") -> Pair:
    """As ``with_weights``, once torch has let its weights go; tables stay."""
    pair = with_weights(name, kind, keep_torch_weights=False)
    call(pair.fast, prompts(name))
    return pair


def test_an_encoder_without_padding_needs_none_of_them() -> None:
    options = {"weights": "int8", "keep_torch_weights": False}
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    config.intermediate_size = 64
    model = fastgen.FastBertModel(config).eval()
    model.engine_options = options
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for _ in range(2):
            assert torch.equal(model(input_ids=ids, attention_mask=mask).last_hidden_state, first)
            assert model(input_ids=ids).last_hidden_state.shape == first.shape
    assert any(isinstance(p, Gone) for p in model.parameters())


@pytest.mark.parametrize("name", ["t5-1.1", "t5-1.0", "bart", "gpt2"])
def test_without_torchs_weights_results_are_the_same(name: str) -> None:
    kept, pair, ids = with_weights(name, "int8"), light(name), prompts(name)
    matrices = [p for n, p in pair.fast.named_parameters() if isinstance(p, Gone)]
    places = [m.weight for m in pair.fast.modules() if isinstance(m, torch.nn.Embedding)]
    others = [p for p in pair.fast.parameters() if p.ndim == 2 and not isinstance(p, Gone)]
    assert matrices and {*map(id, others)} <= {*map(id, places)}
    for _ in range(2):
        assert torch.equal(call(pair.fast, ids), call(kept.fast, ids))
        found, wanted = (
            m.generate(ids, max_new_tokens=70, num_beams=2) for m in (pair.fast, kept.fast)
        )
        assert torch.equal(found, wanted)
    assert pair.fast.num_parameters() == kept.fast.num_parameters()
    assert pair.fast.device.type == "cpu" and pair.fast.dtype == torch.float32


@pytest.mark.parametrize("loaded", [False, True])
def test_in_inference_mode(loaded: bool) -> None:
    expected, kept = light("t5-1.1").fast, with_weights("t5-1.1", "int8").fast
    if loaded:
        with torch.inference_mode():
            model = copy.deepcopy(kept)
    else:
        model = copy.deepcopy(kept)
    model.engine_options = {"weights": "int8", "keep_torch_weights": False}
    ids = prompts("t5-1.1")
    with torch.inference_mode():
        found = model.generate(ids, max_new_tokens=5)
    assert isinstance(model.lm_head.weight, Gone)
    with torch.no_grad():
        for again in (model, expected):
            assert torch.equal(again.generate(ids, max_new_tokens=5), found)


def test_the_memory_is_given_back() -> None:
    pair = with_weights("t5-1.1", "int8", keep_torch_weights=False)
    weight = pair.fast.decoder.block[0].layer[2].DenseReluDense.wo.weight
    memory = weakref.ref(weight.untyped_storage())
    shape, place = weight.shape, weight.data_ptr()
    logits(pair.fast)
    gc.collect()
    assert memory() is None
    assert isinstance(weight, torch.nn.Parameter)
    assert (weight.shape, weight.data_ptr()) == (shape, place)


NEEDS: dict[str, Callable[[Any], Any]] = {
    "torch": lambda m: m(inputs_embeds=torch.ones(1, 2, 32), decoder_input_ids=targets()[:1]),
    "saving": lambda m: m.state_dict(),
    "half": lambda m: m.half(),
    "a copy": copy.deepcopy,
    "a look": lambda m: m.lm_head.weight.sum(),
    "an edit": lambda m: m.lm_head.weight.data.mul_(2),
    "other options": lambda m: [setattr(m, "engine_options", {}), logits(m)],
    "another graph": lambda m: m.generate(
        sources(), output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=3
    ),
}


@pytest.mark.parametrize("need", NEEDS)
def test_what_needs_torchs_weights_says_that_they_are_gone(need: str) -> None:
    model = light("t5-1.1").fast
    with pytest.raises(WeightsGoneError, match=r"was let go.*keep_torch_weights=True"):
        NEEDS[need](model)


def test_tables_that_stay_are_still_edited() -> None:
    """Tied embeddings stay, and what was made of them follows their edits."""
    pair = light("t5-1.0")
    before = logits(pair.fast)
    assert not isinstance(pair.fast.lm_head.weight, Gone)
    pair.fast.decoder.final_layer_norm.weight.data.mul_(2)
    torch.testing.assert_close(logits(pair.fast), 2 * before, rtol=1e-3, atol=1e-3)
    pair.fast.shared.weight.data.mul_(2)
    with pytest.raises(WeightsGoneError):  # the engine of other numbers needs all
        logits(pair.fast)


def test_a_weight_that_gradients_may_be_asked_of_stays() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 32))
    held = (weight * weight).sum()
    let_go(weight, "weight")
    assert not isinstance(weight, Gone)
    held.backward()


# Refusals


def test_weights_with_an_infinity_are_left_to_torch() -> None:
    pair = with_weights("t5-1.1", "int8")
    with torch.no_grad():
        pair.fast.lm_head.weight[0, 0] = torch.inf
    reason = refusal(pair.fast)
    assert reason is not None and "lm_head.weight: a weight with an infinity or NaN" in reason


def test_8_bit_floats_are_for_gpus() -> None:
    with pytest.raises(NoEngine, match=r"weights='fp8'\) is for NVIDIA GPUs"):
        with_weights("t5-1.1", "fp8").fast.compile_engine()
