"""Models whose weights a library holds in fewer bits: served by the same values, or by torch."""

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import fastgen
from fastgen.blockwise import dequantise, quantise
from fastgen.errors import FallbackWarning, WeightsGoneError
from fastgen.hf.checkpoints.held import Looked
from fastgen.hf.let_go import Gone
from tests.configs import Pair, prompts
from tests.generation.emulate import gpu_paths
from tests.helpers import CLOSE, assert_left_to_torch, assert_served, copies, logits, refusal
from tests.hf.checkpoints.fakes import (
    Held,
    bitsandbytes,
    bitsandbytes_4bit,
    float8,
    hold,
    of_library,
    quanto,
    torchao,
)
from tests.hf.test_quantised import assert_most_rows_close, call
from tests.quantised import rounded

#: How a library holds weights, and what engines then read.
SERVED: dict[str, tuple[Held, str]] = {
    "torchao int8": (torchao(), "torchao's int8"),
    "torchao int8 zeros": (torchao(zeros=True), "torchao's int8"),
    "torchao int8 groups": (torchao(group=16), "torchao's int8"),
    "torchao int4": (torchao(bits=4, group=16), "torchao's int4"),
    "torchao int4 zeros": (torchao(bits=4, zeros=True), "torchao's int4"),
    "torchao int3": (torchao(bits=3, group=32, zeros=True), "torchao's int4"),
    "quanto int8": (quanto(), "quanto's int8"),
}
INT8 = torchao()


def held(how: Held = INT8, name: str = "t5-1.1", **options: Any) -> Pair:
    """Copies of a variant's models whose weights are held so."""
    pair = copies(name)
    for model in (pair.stock, pair.fast):
        hold(model, how)
    pair.fast.engine_options = options
    return pair


@pytest.mark.parametrize("how", SERVED)
def test_the_engine_reads_the_very_same_values(how: str) -> None:
    make, words = SERVED[how]
    pair = held(make)
    assert_served(pair)
    arguments = {"max_new_tokens": 20, "do_sample": False, "num_beams": 2}
    assert str(pair.fast.explain(**arguments)) == f"fast loop, {words} weights"
    ids = prompts("t5-1.1", rows=3)
    found, expected = (m.generate(ids, **arguments) for m in (pair.fast, pair.stock))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["t5-1.0", "bart-sizes", "umt5"])
def test_families(name: str) -> None:
    pair, ids = held(torchao(group=16, zeros=True), name), prompts(name, rows=2)
    found, expected = (m.generate(ids, max_new_tokens=9) for m in (pair.fast, pair.stock))
    assert str(pair.fast.explain(max_new_tokens=9)) == "fast loop, torchao's int8 weights"
    assert torch.equal(found, expected)


def test_bert() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=96, intermediate_size=64)
    stock = BertForSequenceClassification(config).eval()
    fast = fastgen.FastBertForSequenceClassification(config).eval()
    fast.load_state_dict(stock.state_dict())
    for model in (stock, fast):
        hold(model, torchao(bits=4, group=16))  # the classifier too, which torch runs
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, 6:] = 0
    with torch.no_grad():
        assert str(fast.explain(input_ids=ids)) == "engine, torchao's int4 weights"
        found, expected = (m(ids, attention_mask=mask).logits for m in (fast, stock))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_inputs_are_rounded_where_fewer_bits_are_asked_for_too() -> None:
    """And with them the weights that the library left whole, such as the head's."""
    pair, ids = held(weights="int8"), prompts("t5-1.1", rows=8)
    found, exact = call(pair.fast, ids), call(pair.stock, ids)
    head = pair.stock.lm_head
    whole = dequantise(quantise(head.weight, "int8"), tuple(head.weight.shape), torch.float32)
    head.weight = torch.nn.Parameter(whole)
    for part in pair.stock.modules():
        if isinstance(part, torch.nn.Linear):  # a row is one block
            part.register_forward_pre_hook(lambda _, x: (rounded(x[0], x[0].shape[-1]), *x[1:]))
    assert_most_rows_close(found, call(pair.stock, ids))
    assert not torch.allclose(found, exact, rtol=1e-3, atol=1e-3)
    assert str(pair.fast.explain()) == "fast loop, torchao's int8 weights"


# Memory


def test_torchs_copy_is_let_go() -> None:
    kept, pair, ids = held().fast, held(keep_torch_weights=False), prompts("t5-1.1")
    weight = pair.fast.decoder.block[0].layer[2].DenseReluDense.wo.weight
    values = weakref.ref(weight.qdata)
    del weight
    for _ in range(2):
        found, expected = (m.generate(ids, max_new_tokens=70) for m in (pair.fast, kept))
        assert torch.equal(found, expected)
    gc.collect()
    assert values() is None
    assert isinstance(pair.fast.decoder.block[0].layer[2].DenseReluDense.wo.weight, Gone)
    assert not isinstance(pair.fast.lm_head.weight, Gone)
    assert str(pair.fast.explain()) == "fast loop, torchao's int8 weights"
    with pytest.raises(WeightsGoneError):
        pair.fast(inputs_embeds=torch.ones(1, 2, 32), decoder_input_ids=ids)


# Edits


def in_place(model: Any) -> None:
    model.decoder.block[0].layer[2].DenseReluDense.wo.weight.qdata.bitwise_not_()


def scales(model: Any) -> None:
    model.encoder.block[1].layer[0].SelfAttention.v.weight.scale.mul_(3)


def another_weight(model: Any) -> None:
    linear = model.decoder.block[0].layer[1].EncDecAttention.q
    linear.weight = torch.nn.Parameter(3 * linear.weight.dequantize())


def held_otherwise(model: Any) -> None:
    linear = model.decoder.block[0].layer[1].EncDecAttention.o
    linear.weight = torch.nn.Parameter(3 * linear.weight.dequantize())
    torchao(bits=4, group=16)(linear)


@pytest.mark.parametrize("edit", [in_place, scales, another_weight, held_otherwise])
def test_edits_are_noticed(edit: Callable[[Any], None]) -> None:
    pair = held()
    before = logits(pair.fast)
    for model in (pair.fast, pair.stock):
        edit(model)
    assert_served(pair)
    assert not torch.allclose(logits(pair.fast), before)


def test_a_known_call_looks_at_the_weights_behind_its_launches() -> None:
    pair, ids = held(prepack=0.0), prompts("t5-1.1")
    options = {"max_new_tokens": 9, "do_sample": False}
    with (
        gpu_paths(),
        mock.patch.object(Looked, "same", autospec=True, side_effect=Looked.same) as same,
    ):
        for _ in range(3):
            pair.fast.generate(ids, **options)
        assert pair.fast._looks_later()
        same.reset_mock()
        with mock.patch.object(type(pair.fast), "_known_call", side_effect=AssertionError):
            before = pair.fast.generate(ids, **options)
        assert same.call_count == len(pair.fast._looked) + len(pair.fast.encoder._looked) > 0
        for model in (pair.fast, pair.stock):
            scales(model)
        found = pair.fast.generate(ids, **options)
    assert torch.equal(found, pair.stock.generate(ids, **options))
    assert not torch.equal(found, before)


# What is left to torch


REFUSED: dict[str, tuple[Held, str]] = {
    "float8": (float8, "weights are torchao's Float8Tensor: Int8WeightOnlyConfig and"),
    "small groups": (torchao(bits=4, group=8), "groups of 8 inputs, where 32 in multiples of 16"),
    "inputs": (
        torchao(act_quant_kwargs="per row"),
        "torchao rounds inputs to 8 bits, as no engine does to the same numbers: "
        "EngineOptions(weights='int8') serves it",
    ),
    "bitsandbytes": (
        bitsandbytes,
        "bitsandbytes rounds inputs to float16 and 8 bits, as no engine does to the same numbers: "
        "EngineOptions(weights='int8') serves it",
    ),
    "bitsandbytes 4 bits": (bitsandbytes_4bit, "bitsandbytes' Linear4bit, whose values are no"),
    "quanto int4": (quanto("qint4"), "weights are quanto's qint4 (WeightQBytesTensor of a Linear)"),
    "quanto activations": (quanto(activation_qtype="qint8"), "quanto rounds inputs to 8 bits"),
    "gptq": (
        of_library("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear"),
        "weights are GPTQ's or AWQ's TorchQuantLinear, which only torch runs: load the model",
    ),
    "hqq": (of_library("hqq.core.quantize", "HQQLinear"), "weights are HQQ's HQQLinear"),
    "transformers": (
        of_library("transformers.integrations.bitnet", "BitLinear"),
        "weights are transformers' own BitLinear",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_the_others_are_left_to_torch_with_a_reason(how: str) -> None:
    make, reason = REFUSED[how]
    pair, ids = held(make), prompts("t5-1.1")
    with pytest.warns(FallbackWarning, match=re.escape(reason)):
        found = pair.fast.generate(ids, max_new_tokens=9)
    assert torch.equal(found, pair.stock.generate(ids, max_new_tokens=9))
    assert_left_to_torch(pair, reason)


ROUNDS = {
    "torchao": torchao(act_quant_kwargs="per row"),
    "bitsandbytes": bitsandbytes,
    "quanto": quanto(activation_qtype="qint8"),
}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("how", ROUNDS)
def test_what_rounds_inputs_is_served_where_fewer_bits_are_asked_for(how: str, ran: bool) -> None:
    """By the same weights, whether torch has run before or not."""
    pair, same = held(ROUNDS[how]), held(weights="int8")
    if ran:
        logits(pair.fast)
    pair.fast.engine_options = {"weights": "int8"}
    assert refusal(pair.fast) is None
    torch.testing.assert_close(logits(pair.fast), logits(same.fast), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": "int4"}, "EngineOptions(weights='int4'), where torchao has made them int8"),
        ({"backend": "torch"}, "switches engines off"),
    ],
)
def test_options_that_do_not_go_with_it(options: dict[str, Any], reason: str) -> None:
    assert_left_to_torch(held(**options), reason)


def test_an_embedding_in_fewer_bits() -> None:
    pair = held()
    pair.fast.shared.weight = INT8(torch.nn.Linear(32, 96)).weight
    reason = refusal(pair.fast)
    assert "torchao's Int8Tensor in a Embedding" in str(reason), reason


def test_in_bfloat16_on_the_cpu() -> None:
    pair = copies()
    exact = copy.deepcopy(pair.stock.to(torch.bfloat16)).float()
    hold(exact, INT8)  # in float32, of the numbers that the others have
    for model in (pair.stock, pair.fast.to(torch.bfloat16)):
        hold(model, INT8)
    assert refusal(pair.fast) is None
    found, stock, expected = (logits(m).float() for m in (pair.fast, pair.stock, exact))
    assert (found - expected).norm() <= (stock - expected).norm()
