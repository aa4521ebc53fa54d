"""Contenders of encoder calls: token ids to hidden states."""

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForTextEncoding

import fastgen
from fastgen.bench.contender import Contender, CTranslate2Base
from fastgen.bench.openvino import OpenVINO, OpenVINOInt8
from fastgen.bench.workload import Encoding


class HuggingFaceEncoder(Contender):
    """The stock class."""

    name = "hf"
    package = "transformers"

    def load(self, path: str) -> None:
        self.model = self._model_class(path).from_pretrained(path, dtype=self.dtype)
        self.model.to(self.device).eval()

    def inputs(self, workload: Encoding) -> dict[str, torch.Tensor]:
        ids, mask = workload.tokens(self.vocab_size)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    @torch.no_grad()
    def call(self, inputs: dict[str, torch.Tensor], workload: Encoding) -> Any:
        hidden = self.model(**inputs).last_hidden_state
        return hidden, inputs["attention_mask"]

    def result(self, output: Any) -> torch.Tensor:
        hidden, mask = output
        return hidden[mask != 0].to("cpu", torch.float32)

    def _model_class(self, path: str) -> Any:
        return AutoModelForTextEncoding


class HuggingFaceCompiled(HuggingFaceEncoder):
    """The stock class, its forward compiled by ``torch.compile`` for each size by itself."""

    name = "hf-compile"

    def load(self, path: str) -> None:
        super().load(path)
        mode = "reduce-overhead" if self.device == "cuda" else None
        self.model.forward = torch.compile(self.model.forward, dynamic=False, mode=mode)


class FastgenEncoder(HuggingFaceEncoder):
    """This library."""

    name = "fastgen"
    package = "fastgen"

    @property
    def version(self) -> str:
        return fastgen.__version__

    def _model_class(self, path: str) -> Any:
        """The Fast class of the class that transformers takes for encoding this model's texts."""
        config = AutoConfig.from_pretrained(path)
        stock = AutoModelForTextEncoding._model_mapping[type(config)].__name__
        try:
            return getattr(fastgen, f"Fast{stock}")
        except AttributeError as error:
            raise ValueError(f"fastgen has no class for {stock}.") from error

    @torch.no_grad()
    def engine(self, workload: Encoding) -> str:
        """``engine`` or ``torch``, as ``model.explain()`` says of such a call."""
        path: str = self.model.explain(**self.inputs(workload)).path
        return path


class CTranslate2Encoder(CTranslate2Base):
    """Its encoder alone."""

    @property
    def runner_class(self) -> str:
        return "Encoder"

    def inputs(self, workload: Encoding) -> list[list[int]]:
        ids, _ = workload.tokens(self.vocab_size)
        rows = zip(ids.tolist(), workload.lengths, strict=True)
        return [row[:length] for row, length in rows]

    def call(self, inputs: list[list[int]], workload: Encoding) -> Any:
        return self.runner.forward_batch(inputs).last_hidden_state, workload.lengths

    def result(self, output: Any) -> torch.Tensor:
        view, lengths = output
        library = self.library
        view = view.to(library.DataType.float32).to_device(library.Device.cpu)
        hidden = torch.from_numpy(np.array(view))
        return torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])


CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (
        FastgenEncoder,
        HuggingFaceEncoder,
        HuggingFaceCompiled,
        CTranslate2Encoder,
        OpenVINO,
        OpenVINOInt8,
    )
}
"""See ``contenders.contenders``."""
