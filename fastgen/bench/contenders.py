"""Who takes part in a benchmark: one small class for each library and way of calling it."""

import importlib.metadata
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForSeq2SeqLM

import fastgen
from fastgen.bench.workload import SEED, TOP_K, TOP_P, Workload


class Contender(ABC):
    """One way to generate: prepared once on disk, loaded once, called many times.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: what weights are stored and computed in.
        vocab_size: number of ids the model knows; also the end-of-sequence id (see Workload).
    """

    name: ClassVar[str]
    package: ClassVar[str]
    draws_with_torch: ClassVar[bool] = True
    """Whether the same seed should sample the stock class's tokens."""

    def __init__(self, device: str, dtype: torch.dtype, vocab_size: int) -> None:
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

    def prepare(self, checkpoint: str, folder: Path) -> str:
        """Do what is done once per checkpoint, ahead of loading; return what ``load`` takes."""
        return checkpoint

    @abstractmethod
    def load(self, path: str) -> None:
        """Put the weights on the device, ready for ``generate``."""

    def inputs(self, workload: Workload) -> Any:
        """The workload's prompts in the form ``generate`` takes."""
        return workload.prompts(self.vocab_size).to(self.device)

    @abstractmethod
    def generate(self, inputs: Any, workload: Workload) -> Any:
        """One whole call; the same seed before each. May return before the device is done."""

    @abstractmethod
    def tokens(self, output: Any) -> list[list[int]]:
        """New ids of each row, from what ``generate`` returned."""


class HuggingFace(Contender):
    """The stock class, as most programs call it."""

    name = "hf"
    package = "transformers"
    model_class: Any = AutoModelForSeq2SeqLM
    extra_kwargs: ClassVar[dict[str, Any]] = {}

    def load(self, path: str) -> None:
        self.model = self.model_class.from_pretrained(path, dtype=self.dtype).to(self.device)
        self.model.eval()

    def generate(self, inputs: torch.Tensor, workload: Workload) -> torch.Tensor:
        torch.manual_seed(SEED)
        return self.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            **workload.generate_kwargs(self.vocab_size),
            **self.extra_kwargs,
        )

    def tokens(self, output: torch.Tensor) -> list[list[int]]:
        return output[:, 1:].tolist()  # the first column is the decoder start token


class HuggingFaceStatic(HuggingFace):
    """The stock class with a static KV cache, which it compiles by itself on a GPU."""

    name = "hf-static"
    extra_kwargs: ClassVar[dict[str, Any]] = {"cache_implementation": "static"}


class Fastgen(HuggingFace):
    """This library."""

    name = "fastgen"
    package = "fastgen"

    @property
    def version(self) -> str:
        return fastgen.__version__

    def load(self, path: str) -> None:
        self.model_class = fastgen.FastAutoModelForSeq2SeqLM
        super().load(path)


class CTranslate2(Contender):
    """CTranslate2, on a conversion of the same weights."""

    name = "ctranslate2"
    package = "ctranslate2"
    draws_with_torch = False

    def prepare(self, checkpoint: str, folder: Path) -> str:
        from fastgen.bench.convert import convert

        self._require()
        converted = folder / "ctranslate2"
        convert(checkpoint, converted, self.dtype)
        return str(converted)

    def load(self, path: str) -> None:
        ctranslate2 = self._require()
        self.translator = ctranslate2.Translator(
            path,
            device=self.device,
            compute_type=_dtype_name(self.dtype),
            intra_threads=torch.get_num_threads(),
        )
        self.library = ctranslate2

    def inputs(self, workload: Workload) -> list[list[str]]:
        rows = workload.prompts(self.vocab_size).tolist()
        return [[str(token) for token in row] for row in rows]

    def generate(self, inputs: list[list[str]], workload: Workload) -> Any:
        sampling: dict[str, Any] = {}
        if workload.sample:
            sampling = {"sampling_topk": TOP_K, "sampling_topp": TOP_P}
        self.library.set_random_seed(SEED)
        return self.translator.translate_batch(
            inputs,
            beam_size=workload.beams,
            max_input_length=0,
            # A minimum would make it write the score of the end token, an id past the last one.
            min_decoding_length=0,
            max_decoding_length=workload.new_tokens,
            end_token=[self.vocab_size],
            **sampling,
        )

    def tokens(self, output: Any) -> list[list[int]]:
        return [[int(token) for token in result.hypotheses[0]] for result in output]

    def _require(self) -> Any:
        """The module, if it computes in this dtype on this device."""
        import ctranslate2

        wanted = _dtype_name(self.dtype)
        supported = ctranslate2.get_supported_compute_types(self.device)
        if wanted not in supported:
            raise ValueError(
                f"CTranslate2 does not compute in {wanted} on this {self.device}, only in "
                f"{', '.join(sorted(supported))}."
            )
        return ctranslate2


CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (Fastgen, HuggingFace, HuggingFaceStatic, CTranslate2)
}
"""By name, in the order in which reports list them; ``fastgen`` is the one others are peers of."""


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
