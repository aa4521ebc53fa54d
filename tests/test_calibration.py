"""Calibration as data: its steps, what is left out, and its file."""

from pathlib import Path

import pytest

from fastgen.calibration import FILE_NAME, Calibration, Range

SOME = Calibration(
    {"a.query": Range(-1.5, 2.5), "a.dense": Range(0.0, 6.0)},
    {"a.dense": Range(-3.0, 1.0)},
    attention=True,
    method="max",
)


@pytest.mark.parametrize(
    ("ends", "zero", "step"),
    [((-1.0, 1.0), 128, 2 / 255), ((0.0, 2.0), 0, 2 / 255), ((-2.0, 0.0), 255, 2 / 255)],
)
def test_integers_of_a_range(ends: tuple[float, float], zero: int, step: float) -> None:
    assert Range(*ends).asymmetric() == (pytest.approx(step), zero)
    assert Range(*ends).symmetric() == pytest.approx(max(map(abs, ends)) / 127)


def test_zero_is_an_integer_of_each_range() -> None:
    assert Range(1.0, 3.0).asymmetric() == (pytest.approx(3 / 255), 0)
    assert Range(-3.0, -1.0).asymmetric() == (pytest.approx(3 / 255), 255)


def test_what_is_always_zero_has_a_step() -> None:
    assert Range(0.0, 0.0).asymmetric()[0] > 0 and Range(0.0, 0.0).symmetric() > 0


@pytest.mark.parametrize("ends", [(1.0, -1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_no_range(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="two finite numbers in order"):
        Range(*ends)


def test_layers_left_out() -> None:
    less = SOME.without("*.dense")
    assert set(less.inputs) == {"a.query"} and not less.outputs
    assert less.attention and less.method == "max"
    with pytest.raises(ValueError, match=r"'b\.\*' matches no calibrated layer; there are a.dense"):
        SOME.without("b.*")


def test_file(tmp_path: Path) -> None:
    assert SOME.save(tmp_path) == tmp_path / FILE_NAME
    assert Calibration.load(tmp_path) == SOME
    assert Calibration.load(SOME.save(tmp_path / "mine.json")) == SOME


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}'])
def test_no_calibration(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match="is not a calibration"):
        Calibration.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none.json")
