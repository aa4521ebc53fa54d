"""Who takes part in a benchmark: one small class for each library and way of calling it."""

import importlib.metadata
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch


class Contender(ABC):
    """One way to run a model: prepared once on disk, loaded once, called many times.

    Args:
        kind: ``seq2seq``, ``causal`` or ``encoder``.
        device: ``cpu`` or ``cuda``.
        dtype: what weights are stored and computed in.
        vocab_size: number of ids the model knows; also the end-of-sequence id (see Workload).
    """

    name: ClassVar[str]
    package: ClassVar[str] = ""
    draws_with_torch: ClassVar[bool] = True
    """Whether the same seed should sample the stock class's tokens."""
    model: Any = None
    """The torch module, once loaded, if there is one."""

    def __init__(self, kind: str, device: str, dtype: torch.dtype, vocab_size: int) -> None:
        self.kind = kind
        self.device = device
        self.dtype = dtype
        self.vocab_size = vocab_size

    @property
    def version(self) -> str | None:
        """Version of the library that does the work; None if it is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def missing(self) -> str:
        """What to do where ``version`` is None."""
        return f"not installed: pip install {self.package}"

    @property
    def process(self) -> int | None:
        """Id of the process that does the work; None: this one."""
        return None

    def close(self) -> None:
        """Let go of the model, and of a process that holds it."""
        self.model = None

    def prepare(self, checkpoint: str, folder: Path) -> str:
        """Do what is done once per checkpoint, ahead of loading; return what ``load`` takes."""
        return checkpoint

    @abstractmethod
    def load(self, path: str) -> None:
        """Put the weights on the device, ready for calls."""

    @abstractmethod
    def inputs(self, workload: Any) -> Any:
        """The workload's token ids in the form ``call`` takes."""

    @abstractmethod
    def call(self, inputs: Any, workload: Any) -> Any:
        """One whole call; the same seed before each. May return before the device is done."""

    @abstractmethod
    def result(self, output: Any) -> Any:
        """What is compared, from what ``call`` returned: new ids of each row, or of an encoder the
        hidden states of all real tokens [T, E], in float32 on the CPU."""

    def engine(self, workload: Any) -> str | None:
        """What ran the calls, in words, where a library has more than one way."""
        return None


class CTranslate2Base(Contender):
    """CTranslate2, on a conversion of the same weights."""

    name = "ctranslate2"
    package = "ctranslate2"

    @property
    def runner_class(self) -> str:
        """Which of the library's classes runs the model."""
        raise NotImplementedError

    def prepare(self, checkpoint: str, folder: Path) -> str:
        from fastgen.bench.convert import convert

        ctranslate2(self.device, self.dtype)
        converted = folder / "ctranslate2"
        convert(checkpoint, converted, self.dtype, self.kind)
        return str(converted)

    def load(self, path: str) -> None:
        self.library = ctranslate2(self.device, self.dtype)
        self.runner = getattr(self.library, self.runner_class)(
            path,
            device=self.device,
            compute_type=dtype_name(self.dtype),
            intra_threads=torch.get_num_threads(),
        )


def ctranslate2(device: str, dtype: torch.dtype) -> Any:
    """The module, if it computes in this dtype on this device.

    Raises:
        ValueError: it does not.
    """
    import ctranslate2

    wanted = dtype_name(dtype)
    supported = ctranslate2.get_supported_compute_types(device)
    if wanted not in supported:
        raise ValueError(
            f"CTranslate2 does not compute in {wanted} on this {device}, only in "
            f"{', '.join(sorted(supported))}."
        )
    return ctranslate2


def dtype_name(dtype: torch.dtype) -> str:
    """Such as ``float32``."""
    return str(dtype).removeprefix("torch.")
