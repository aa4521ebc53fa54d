"""Calibration: the ranges of a model's activations, as plain data beside its checkpoint."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

FILE_NAME = "fastgen_calibration.json"
"""What a calibration is called in the folder of a checkpoint."""
_FORMAT = 1
_LEAST = 1e-12  # what is always zero has some scale too


@dataclass(frozen=True)
class Range:
    """The numbers that 8-bit integers stand for; what lies outside becomes the nearest end."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"a range from {self.low} to {self.high}: two finite numbers in order")

    def asymmetric(self) -> tuple[float, int]:
        """Scale and zero point of uint8: ``(integer - zero_point) * scale``; 0 is among them."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = max((high - low) / 255, _LEAST)
        return scale, min(max(round(-low / scale), 0), 255)

    def symmetric(self) -> float:
        """Scale of int8, whose zero point is 0."""
        return max(abs(self.low), abs(self.high), 127 * _LEAST) / 127


@dataclass(frozen=True)
class Calibration:
    """Ranges of what goes into and comes out of a stack's linear layers.

    A layer's name is that of the stack's module, such as ``encoder.layer.0.output.dense``. Layers
    without a range keep the model's own dtype.
    """

    inputs: Mapping[str, Range]
    """Of each linear layer whose product is one of 8-bit integers."""
    outputs: Mapping[str, Range] = field(default_factory=dict)
    """Of linear layers whose results attention multiplies or a residual stream adds."""
    attention: bool = False
    """Attention's two products are of 8-bit integers, too."""
    residuals: bool = False
    """What is added to a residual stream is rounded to 8-bit integers, too."""
    method: str = ""
    """How the ranges were found, in words."""

    def without(self, *patterns: str) -> "Calibration":
        """The same but for the layers whose names match, such as ``"*.output.dense"``.

        Raises:
            ValueError: a pattern matches no layer.
        """
        names = [*self.inputs, *self.outputs]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                some = ", ".join(sorted(set(names))[:4])
                raise ValueError(f"{pattern!r} matches no calibrated layer; there are {some}, ...")

        def kept(ranges: Mapping[str, Range]) -> dict[str, Range]:
            return {
                name: known
                for name, known in ranges.items()
                if not any(fnmatchcase(name, pattern) for pattern in patterns)
            }

        return Calibration(
            *(kept(self.inputs), kept(self.outputs), self.attention, self.residuals, self.method)
        )

    def save(self, path: str | Path) -> Path:
        """Write it as JSON: to a file, or in a folder as ``fastgen_calibration.json``."""
        file = _file(path)
        data = {
            "format": _FORMAT,
            "method": self.method,
            "attention": self.attention,
            "residuals": self.residuals,
            **{
                side: {name: [known.low, known.high] for name, known in ranges.items()}
                for side, ranges in (("inputs", self.inputs), ("outputs", self.outputs))
            },
        }
        file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what ``save`` wrote: a file, or the folder that it is in.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is not a calibration.
        """
        file = _file(path)
        text = file.read_text(encoding="utf-8")
        try:
            return _parsed(json.loads(text))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is not a calibration ({error!r}): write it anew with Calibration.save."
            ) from error


def _parsed(data: dict[str, Any]) -> Calibration:
    if data["format"] != _FORMAT:
        raise ValueError(f"format {data['format']!r}, where {_FORMAT} is known")
    inputs, outputs = (
        {name: Range(float(low), float(high)) for name, (low, high) in data[side].items()}
        for side in ("inputs", "outputs")
    )
    asked = bool(data["attention"]), bool(data["residuals"])
    return Calibration(inputs, outputs, *asked, method=str(data["method"]))


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path
