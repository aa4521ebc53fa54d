"""Training that knows of the integers: what layers compute, and what it is good for."""

from __future__ import annotations

import copy
import inspect
import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fastgen import FastBertForSequenceClassification
from fastgen.calibration import Calibration, Range
from fastgen.quantize import calibrate, convert, prepare_qat
from fastgen.quantize.training import RoundedConv1D
from tests.configs import build_pair
from tests.models.test_bert import call
from tests.quantize.test_calibrate import batches, calibrated, error, first, fresh, products

LENGTH = 32
#: Whose functions and classes: what their docstrings are told apart by.
SOURCES = (os, statistics, json, inspect)


def docstrings() -> tuple[torch.Tensor, torch.Tensor]:
    """The first bytes of docstrings [N, 32], and which module each is from."""
    rows, labels = [], []
    for label, module in enumerate(SOURCES):
        for _, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) or inspect.isclass(value) else None
            if text and getattr(value, "__module__", "") != "builtins":
                data = text.encode("ascii", "ignore")[:LENGTH].ljust(LENGTH)
                rows.append([*data])
                labels.append(label)
    return torch.tensor(rows), torch.tensor(labels)


def train(model: Any, ids: torch.Tensor, labels: torch.Tensor, steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(ids), (32,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(input_ids=ids[rows]).logits, labels[rows]).backward()
        optimizer.step()
    model.eval()


def test_training_makes_up_for_what_integers_lose() -> None:
    """A tiny BERT, ranges that are far too narrow, and the loss on its own data."""
    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"intermediate_size": 64, "max_position_embeddings": LENGTH, "num_labels": len(SOURCES)},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    model = FastBertForSequenceClassification(config)
    ids, labels = docstrings()
    train(model, ids, labels, 80, 3e-3)

    def loss() -> float:
        return float(cross_entropy(first(model, input_ids=ids), labels))

    full = loss()
    calibrate(model, [{"input_ids": ids}], percentile=90)
    after = loss()
    assert full < after and full < 0.8 * cross_entropy(torch.zeros(1, 4), labels[:1])
    prepare_qat(model)
    train(model, ids, labels, 25, 5e-4)
    convert(model)
    assert loss() < after
    assert products(model)["com.microsoft.MatMulIntegerToFloat"] == 6


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_layers_compute_what_the_engine_does(head: str) -> None:
    stock, fast = calibrated(head)
    given = call(head, "right")
    kept = given["attention_mask"].bool() if head == "ForTokenClassification" else ...
    integers, right = (first(model, **given)[kept] for model in (fast, stock))
    prepare_qat(fast)
    by_torch = fast(**given)[0]  # with gradients
    assert by_torch.requires_grad
    assert error(by_torch.detach()[kept], integers) < 0.3 * error(right, integers)
    torch.testing.assert_close(first(fast, **given)[kept], integers, rtol=0, atol=1e-5)
    assert fast.explain_forward(**given).path == "torch"
    with torch.no_grad():
        assert fast.explain_forward(**given).path == "engine"


def test_gradients_pass_the_rounding_and_stop_beyond_a_range() -> None:
    fast = calibrated()[1]
    layer = fast.encoder.layer[0].intermediate.dense
    prepare_qat(fast)
    high = layer.read.high
    x = torch.tensor([[0.0, high / 2, 3 * high, -99.0]]).repeat(1, 8).requires_grad_()
    layer(x).sum().backward()
    plain = layer.rounded_weight().sum(0)
    inside = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(8)
    torch.testing.assert_close(x.grad[0], plain * inside)
    assert layer.weight.grad.abs().sum() > 0


def test_conversion_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    fast = calibrated("ForSequenceClassification")[1]
    names, text = list(fast.state_dict()), repr(fast)
    known, right = fast.calibration, first(fast, **call("ForSequenceClassification"))
    prepare_qat(prepare_qat(fast))  # twice does no harm
    assert list(fast.state_dict()) == names and "RoundedLinear" in repr(fast)
    fast.save_pretrained(tmp_path)
    assert convert(copy.deepcopy(fast)).calibration == known
    assert repr(convert(fast)) == text
    torch.testing.assert_close(first(fast, **call("ForSequenceClassification")), right)
    loaded = type(fast).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(first(loaded, **call("ForSequenceClassification")), right)
    assert BertForSequenceClassification.from_pretrained(tmp_path)


def test_trainer(tmp_path: Path) -> None:
    """Trains the weights, evaluates in integers, and keeps the calibration in its checkpoints."""
    fast = prepare_qat(calibrated("ForSequenceClassification")[1])
    ids = call("ForSequenceClassification")["input_ids"]
    rows = [{"input_ids": row, "labels": torch.tensor(i % 5)} for i, row in enumerate(ids)]
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True
    )
    trainer = Trainer(fast, options, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.evaluate()
    assert products(fast)["com.microsoft.MatMulIntegerToFloat"] == 18
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not fast.state_dict()[name].equal(before[name])
    assert Calibration.load(tmp_path / "checkpoint-2") == fast.calibration


def test_gpt2s_layers_lie_the_other_way() -> None:
    layer = copy.deepcopy(build_pair("gpt2").stock.transformer.h[0].mlp.c_fc)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    right = layer(x)
    layer.__class__ = RoundedConv1D
    layer.read = Range(float(x.min()), float(x.max()))
    assert 1e-5 < error(layer(x).detach(), right.detach()) < 0.03


def test_what_cannot_be_prepared() -> None:
    fast = fresh()[1]
    with pytest.raises(ValueError, match="is not calibrated"):
        prepare_qat(fast)
    with pytest.raises(ValueError, match="no layers of prepare_qat"):
        convert(fast)
    known = calibrate(fast, batches())
    fast.encoder.layer = fast.encoder.layer[:2]
    with pytest.raises(ValueError, match="of another model: there is no layer "):
        prepare_qat(fast, known)
