"""The writer of docstrings: its data, and a training run of a few steps."""

import json
import sys
from pathlib import Path

import pytest
import torch

from examples.docstrings import train
from examples.docstrings.data import END, PAD, decode, docstrings, encode, is_held_out

SOURCE = '''"""A module that is long enough."""

class A:
    """A class whose docstring
    has an indented line."""

    def f(self):
        """Too short."""

    async def g(self):
        """A module that is long enough."""

    def h(self):
        """Letters beyond ASCII: \u00e9, left out."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "library"
    (folder / "test").mkdir(parents=True)
    (folder / "a.py").write_text(SOURCE, encoding="utf-8")
    (folder / "broken.py").write_text('"""A module that does not parse."""\n(')
    (folder / "test" / "b.py").write_text('"""What tests say is left out."""\n')
    return folder


def test_docstrings_are_long_ascii_and_each_there_once(library: Path) -> None:
    assert docstrings(library) == [
        "A module that is long enough.",
        "A class whose docstring\nhas an indented line.",
    ]


def test_this_pythons_library_has_docstrings_on_both_sides() -> None:
    texts = [text for text in docstrings(Path(json.__file__).parent)]
    assert any("JSON" in text for text in texts)
    sides = [is_held_out(f"text {i}") for i in range(1000)]
    assert 20 < sum(sides) < 80


def test_text_is_a_token_a_byte() -> None:
    assert encode(["ab", "c"]) == [END, 97, 98, END, 99]
    assert decode([END, 97, 98, END, PAD]) == "ab"


def test_windows_are_pieces_of_the_text() -> None:
    tokens = torch.arange(train.LENGTH + 5)
    rows = train.windows(tokens, 4)
    assert rows.shape == (4, train.LENGTH)
    assert torch.equal(rows - rows[:, :1], torch.arange(train.LENGTH).expand(4, -1))
    with pytest.raises(ValueError, match="7 bytes of text"):
        train.windows(tokens[:7], 1)


def test_learning_rate_rises_then_falls() -> None:
    rates = [train.learning_rate(progress / 100, 1.0) for progress in range(101)]
    assert rates[0] == 0
    assert max(rates) == max(rates[: int(200 * train.WARMUP)])
    assert rates[-1] == pytest.approx(0.1)


def test_training_learns_and_saves_what_loads_as_fp32(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The quick brown fox jumps over the lazy dog, again and again. "
    for name in range(40):  # of which some are held out
        (library / f"m{name}.py").write_text(f'"""{name} {text * 8}"""\n')
    monkeypatch.setattr(train, "LENGTH", 32)
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--library", str(library), "--steps", "30"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--batch-size", "2"])
    train.main()
    figures = json.loads((out / "training.json").read_text())
    assert figures["held_out_bits_per_byte"] < 5.5  # 7 for a byte of any kind
    assert figures["options"]["steps_done"] == 30
    saved = train.GPT2LMHeadModel.from_pretrained(out)
    assert saved.dtype == torch.float32
    assert (out / "model.safetensors").stat().st_size <= 3_000_000
