"""The committed checkpoint: small, as good as its card says, with the stock class's tokens."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from examples.docstrings import demo
from examples.docstrings.data import PAD, decode, docstrings, encode, is_held_out
from examples.docstrings.train import LENGTH, bits_per_byte

LIBRARY = Path(json.__file__).parent.parent
PARTS = ("asyncio", "email", "idlelib", "unittest", "tkinter", "distutils", "importlib", "logging")
PROMPTS = ("Return the ", "x", "This function is called when the ")


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: demo.load(demo.CHECKPOINT, fast=name == "fast") for name in ("stock", "fast")}


def test_checkpoint_is_a_small_stock_one() -> None:
    config = json.loads((demo.CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert sum(file.stat().st_size for file in demo.CHECKPOINT.iterdir()) <= 3_000_000


def test_fast_loop_serves_prompts(models: dict[str, Any]) -> None:
    ids = torch.tensor([encode(["Return"])])
    assert models["fast"].explain(input_ids=ids).path == "fast loop"


@pytest.mark.parametrize("way", [{}, *demo.WAYS.values()], ids=["greedy", *demo.WAYS])
def test_same_tokens(models: dict[str, Any], way: dict[str, Any]) -> None:
    for prompt in PROMPTS:
        stock, fast = (demo.continued(model, prompt, 60, **way) for model in models.values())
        assert fast == stock, prompt
        assert len(stock) > 5


def test_left_padded_batch_has_the_stock_tokens(models: dict[str, Any]) -> None:
    rows = [encode([prompt]) for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    stock, fast = (
        model.generate(ids, attention_mask=mask, max_new_tokens=60) for model in models.values()
    )
    assert torch.equal(fast, stock)


def test_it_writes_words(models: dict[str, Any]) -> None:
    way = demo.WAYS["sampled"]
    words = decode(demo.continued(models["fast"], demo.PROMPT, 200, **way)).split()
    common = {"the", "of", "a", "to", "is", "for", "and", "in", "be", "by", "or", "file", "string"}
    assert len(words) > 10
    assert sum(word in common for word in words) > len(words) / 4


def test_bits_per_byte_are_what_the_card_claims(models: dict[str, Any]) -> None:
    claimed = json.loads((demo.CHECKPOINT / "training.json").read_text())
    texts = [text for name in PARTS for text in docstrings(LIBRARY / name) if is_held_out(text)]
    tokens = torch.tensor(encode(texts))
    assert len(tokens) > 30 * LENGTH
    # A part of them, or of another Python's, whose text differs
    found = bits_per_byte(models["stock"], tokens)
    assert found == pytest.approx(claimed["held_out_bits_per_byte"], abs=0.3)


def test_demo_continues_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "Return a ", "--rounds", "1", "--tokens", "20"])
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert shown.count("Return a ") == len(demo.WAYS)
    assert "yes" in shown and "NO" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["\u00e9"], "ASCII"), (["a", "--tokens", "255"], "255 positions"), (["--rounds", "0"], "1")],
)
def test_demo_refuses(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    with pytest.raises(SystemExit):
        demo.parse()
    assert message in capsys.readouterr().err
