"""Ranges of what was seen, by four methods: histograms, percentiles and entropy are those of ONNX
Runtime's quantisation tools."""

import io
from contextlib import redirect_stdout
from typing import Any, Literal, get_args

import numpy as np
from onnxruntime.quantization.calibrate import HistogramCollector

from fastgen.calibration import Range

Method = Literal["percentile", "max", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)
_BINS = {"entropy": 512}  # its search takes the square of them
_STEPS = 128  # that the entropy method divides a candidate into: one for each integer of one sign
_CANDIDATES = 100


class Observer:
    """Sees arrays of numbers by name, and says which range to keep of each."""

    def __init__(self, method: Method = "percentile", percentile: float = 99.99) -> None:
        """
        Args:
            method: ``max``: all that was seen. ``percentile``: without the farthest, half of them
                at each end. ``entropy``: the symmetric range that loses the least information (by
                Kullback and Leibler's divergence). ``mse``: that of the least squared error.
            percentile: of all numbers, how many per cent lie inside; for ``percentile`` alone.

        Raises:
            ValueError: a method that does not exist, or a percentile outside of 50 .. 100.
        """
        if method not in METHODS:
            raise ValueError(f"method={method!r}: allowed are {', '.join(map(repr, METHODS))}.")
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile={percentile}: allowed is more than 50, up to 100.")
        self.method, self.percentile = method, percentile
        self._collector = HistogramCollector(
            method="percentile" if method == "mse" else method,
            symmetric=False,
            num_bins=_BINS.get(method, 2048),
            num_quantized_bins=_STEPS,
            percentile=percentile,
            scenario="same",
        )
        self._ends: dict[str, tuple[float, float]] = {}

    def see(self, name: str, values: np.ndarray) -> None:
        """Add numbers: float32 in any shape.

        Raises:
            ValueError: one of them is infinite or no number.
        """
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not np.isfinite((low, high)).all():
            raise ValueError(f"{name} is not finite: it has no range. Leave out such batches.")
        known = self._ends.get(name, (low, high))
        self._ends[name] = min(known[0], low), max(known[1], high)
        if self.method != "max":
            self._widen(name, max(-low, high))
            self._collector.collect_value({name: values})

    def names(self) -> list[str]:
        """Of all that was seen."""
        return list(self._ends)

    def range(self, name: str) -> Range:
        """What to keep of one."""
        low, high = self._ends[name]
        if self.method != "max" and low < high:
            ends = getattr(self, f"_{self.method}")(self._collector.histogram_dict[name], name)
            low, high = max(low, float(ends[0])), min(high, float(ends[1]))
        return Range(low, max(low, high))

    def _widen(self, name: str, farthest: float) -> None:
        """Make room for numbers farther from zero than all before, in as many bins as there are:
        the collector would add bins as wide as those of the first batch, in any number."""
        known = self._collector.histogram_dict.get(name)
        if known is None or farthest <= known[4]:
            return
        counts, edges, low, high, threshold = known
        wide = max(farthest, 2 * float(threshold))
        middles = (edges[:-1] + edges[1:]) / 2 * (threshold > 0)  # or all are zeros
        counts, edges = np.histogram(middles, len(counts), (-wide, wide), weights=counts)
        ends = low, high, np.float32(wide)
        self._collector.histogram_dict[name] = (counts.astype(np.int64), edges, *ends)

    def _percentile(self, histogram: Any, name: str) -> tuple[float, float]:
        every, self._collector.histogram_dict = self._collector.histogram_dict, {name: histogram}
        try:
            with redirect_stdout(io.StringIO()):  # it prints what it does
                found = self._collector.compute_percentile()[name]
        finally:
            self._collector.histogram_dict = every
        return found[0], found[1]

    def _entropy(self, histogram: Any, name: str) -> tuple[float, float]:
        found = self._collector.get_entropy_threshold(histogram, _STEPS)
        return found[0], found[1]

    def _mse(self, histogram: Any, name: str) -> tuple[float, float]:
        """Of parts of the whole range, the one whose 256 steps are off by the least."""
        counts, edges = histogram[0], histogram[1]
        middles = (edges[:-1] + edges[1:]) / 2
        low, high = self._ends[name]

        def error(part: float) -> float:
            ends = Range(part * low, part * high)
            scale, zero = ends.asymmetric()
            steps = np.clip(np.rint(middles / scale) + zero, 0, 255) - zero
            return float((counts * (steps * scale - middles) ** 2).sum())

        best = min((i / _CANDIDATES for i in range(1, _CANDIDATES + 1)), key=error)
        return best * low, best * high
