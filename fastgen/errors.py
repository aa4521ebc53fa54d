"""What fastgen raises and warns of: each names the value, what is allowed and the remedy."""


class FastgenError(RuntimeError):
    """Base class of every error that fastgen itself raises."""


class MissingRuntimeError(FastgenError, ImportError):
    """No usable ONNX Runtime is installed, or two are; the message holds the command to run."""


class OptionError(FastgenError, ValueError):
    """An engine option has an unknown name or a value that is not allowed."""


class UnsupportedConfigError(FastgenError, ValueError):
    """A model config has a field whose value the engine cannot serve exactly."""


class EngineError(FastgenError):
    """A compiled engine could not be built or failed while running."""


class WeightsGoneError(FastgenError):
    """torch needs weights that were let go (``EngineOptions.keep_torch_weights``)."""


class FallbackWarning(UserWarning):
    """A model's calls take a slower path; the message says why, and what mends it."""
