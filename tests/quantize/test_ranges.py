"""The four methods on numbers whose ranges are known."""

from typing import Any

import numpy as np
import pytest

from fastgen.quantize.ranges import Observer

NORMAL = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)


def found(method: Any, *arrays: np.ndarray, **options: Any) -> tuple[float, float]:
    seen = Observer(method, **options)
    for array in arrays:
        seen.see("x", array)
    known = seen.range("x")
    return known.low, known.high


def test_max_is_all_that_was_seen() -> None:
    assert found("max", np.float32([[1, -2]]), np.float32([5]), np.float32([-1])) == (-2, 5)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_a_percentile_leaves_out_both_ends(percentile: float) -> None:
    low, high = found("percentile", NORMAL[:100_000], NORMAL[100_000:], percentile=percentile)
    beyond = (100 - percentile) / 2
    expected = np.percentile(NORMAL, [beyond, 100 - beyond])
    np.testing.assert_allclose([low, high], expected, atol=0.01)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_a_few_far_numbers_do_not_count(method: str) -> None:
    far = np.concatenate([NORMAL, np.float32([40, -40])])
    low, high = found(method, far, **({"percentile": 99.9} if method == "percentile" else {}))
    assert -32 < low < -2 and 2 < high < 32


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_what_lies_on_one_side_stays_there(method: str) -> None:
    low, high = found(method, np.abs(NORMAL) + 1)
    assert low >= 0 and 2 < high < 7


def test_mse_is_the_least_error() -> None:
    def error(ends: tuple[float, float]) -> float:
        step = (ends[1] - ends[0]) / 255
        rounded = np.clip(np.round((NORMAL - ends[0]) / step), 0, 255) * step + ends[0]
        return float(np.square(rounded - NORMAL).mean())

    least = error(found("mse", NORMAL))
    assert least < error(found("max", NORMAL))
    assert least < error(found("percentile", NORMAL, percentile=99))


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_later_batches_may_be_much_larger(method: str) -> None:
    seen = Observer(method)
    for scale in (0, 1e-6, 1, 1e4):
        seen.see("x", scale * NORMAL[:1000])
    known = seen.range("x")
    assert known.low < -2e3 and known.high > 2e3
    assert len(seen._collector.histogram_dict["x"][0]) < 10_000


def test_numbers_that_have_no_range() -> None:
    assert found("percentile", np.zeros(9, np.float32)) == (0, 0)
    assert found("percentile", np.full(9, 3, np.float32)) == (3, 3)
    with pytest.raises(ValueError, match="x is not finite"):
        found("max", np.float32([1, np.inf]))
    with pytest.raises(ValueError, match="x is not finite"):
        found("mse", np.float32([1, np.nan]))


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="method='min': allowed are 'percentile', 'max', "):
        Observer("min")  # type: ignore[arg-type]
    for percentile in (0, 50, 101):
        with pytest.raises(ValueError, match=f"percentile={percentile}: allowed is more than 50"):
            Observer("percentile", percentile)


def test_it_prints_nothing(capsys: pytest.CaptureFixture) -> None:
    for method in ("percentile", "entropy", "mse"):
        found(method, NORMAL[:100])
    assert capsys.readouterr().out == ""
