"""8-bit integers for encoders: calibration of their activations, and training that knows of it."""

from fastgen.calibration import Calibration, Range
from fastgen.quantize.calibrate import calibrate

__all__ = ["Calibration", "Range", "calibrate"]
