"""8-bit integers for encoders: calibration of their activations, and training that knows of it."""

from fastgen.calibration import Calibration, Range
from fastgen.quantize.calibrate import calibrate
from fastgen.quantize.training import convert, prepare_qat

__all__ = ["Calibration", "Range", "calibrate", "convert", "prepare_qat"]
