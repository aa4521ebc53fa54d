"""Contenders of ``generate``: models with an encoder (``seq2seq``) and without (``causal``)."""

from typing import Any, ClassVar

import torch
import transformers

import fastgen
from fastgen.bench.contender import Contender, CTranslate2Base
from fastgen.bench.openvino import OpenVINO, OpenVINOInt8
from fastgen.bench.workload import SEED, TOP_K, TOP_P, Workload

_AUTO = {"seq2seq": "AutoModelForSeq2SeqLM", "causal": "AutoModelForCausalLM"}


class HuggingFace(Contender):
    """The stock class, as most programs call it."""

    name = "hf"
    package = "transformers"
    extra_kwargs: ClassVar[dict[str, Any]] = {}

    @property
    def model_class(self) -> Any:
        """The auto class that loads the model."""
        return getattr(transformers, _AUTO[self.kind])

    def load(self, path: str) -> None:
        self.model = self.model_class.from_pretrained(path, dtype=self.dtype).to(self.device)
        self.model.eval()

    def inputs(self, workload: Workload) -> torch.Tensor:
        return workload.prompts(self.vocab_size).to(self.device)

    def call(self, inputs: torch.Tensor, workload: Workload) -> torch.Tensor:
        torch.manual_seed(SEED)
        output = self.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            **workload.generate_kwargs(self.vocab_size),
            **self.extra_kwargs,
        )
        # Not new are the prompt, or the decoder start token in its place.
        return output[:, inputs.shape[1] if self.kind == "causal" else 1 :]

    def result(self, output: torch.Tensor) -> list[list[int]]:
        return output.tolist()


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

    @property
    def model_class(self) -> Any:
        return getattr(fastgen, f"Fast{_AUTO[self.kind]}")

    def engine(self, workload: Workload) -> str:
        """``model.explain()``'s path of such a call; on a GPU also whose kernels its steps run."""
        path: str = self.model.explain(**workload.generate_kwargs(self.vocab_size)).path
        fused = self.model.ran_fused() if path != "torch" else None
        if fused is None:
            return path
        return f"{path}, {'fused kernels' if fused else 'no fused kernels'}"


class CTranslate2(CTranslate2Base):
    """Its generation."""

    draws_with_torch = False

    @property
    def runner_class(self) -> str:
        return "Generator" if self.kind == "causal" else "Translator"

    def inputs(self, workload: Workload) -> list[list[str]]:
        rows = workload.prompts(self.vocab_size).tolist()
        return [[str(token) for token in row] for row in rows]

    def call(self, inputs: list[list[str]], workload: Workload) -> Any:
        # A minimum would make it write the score of the end token, an id past the last one.
        kwargs: dict[str, Any] = {"beam_size": workload.beams, "end_token": [self.vocab_size]}
        if workload.sample:
            kwargs |= {"sampling_topk": TOP_K, "sampling_topp": TOP_P}
        self.library.set_random_seed(SEED)
        if self.kind == "causal":
            new = {"max_length": workload.new_tokens, "include_prompt_in_result": False}
            return self.runner.generate_batch(inputs, min_length=0, **new, **kwargs)
        new = {"max_decoding_length": workload.new_tokens, "min_decoding_length": 0}
        return self.runner.translate_batch(inputs, max_input_length=0, **new, **kwargs)

    def result(self, output: Any) -> list[list[int]]:
        if self.kind == "causal":
            return [result.sequences_ids[0] for result in output]
        return [[int(token) for token in result.hypotheses[0]] for result in output]


CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (Fastgen, HuggingFace, HuggingFaceStatic, CTranslate2, OpenVINO, OpenVINOInt8)
}
"""See ``contenders.contenders``."""
