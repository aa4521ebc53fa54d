"""The stacks of an encoder-decoder model: which calls the engine serves."""

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from fastgen.encoder import Encoder
from fastgen.engines import NoEngine, too_large
from fastgen.generation import as_torch, with_signature
from fastgen.modeling import EngineModule
from fastgen.refusals import common_refusal, ids_refusal, mask_refusal
from fastgen.seq2seq import encoder_specs
from fastgen.target import Target


class FastEncoder(EngineModule):
    """Mixin of an encoder stack: token ids in, hidden states out, on the engine."""

    def _encoder_root(self) -> Any:
        """The family's graph module with a method ``encode``."""
        raise NotImplementedError

    def _build_engine(self, target: Target) -> Encoder:
        root, width = self._encoder_root(), self.config.d_model
        self._refuse_foreign_parts([root], ignore="")
        specs = encoder_specs(target, width)
        engine = self._engine_for("encoder", root, target, "encode", specs)
        return Encoder(engine, target, self.device, width, self.engine_options)

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a call with these arguments goes to torch; None if the engine serves it."""
        if reason := common_refusal(self, kwargs):
            return reason
        input_ids = kwargs.get("input_ids")
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            return "inputs_embeds are served by torch"
        if kwargs.get("use_cache"):
            return "use_cache=True: torch reports that an encoder has no KV cache"
        mask = kwargs.get("attention_mask")
        if reason := ids_refusal(self, input_ids) or mask_refusal(mask, input_ids.shape):
            return reason
        if reason := too_large(self.engine_options, *input_ids.shape):
            return reason
        try:
            self._current_engine()
        except NoEngine as error:
            return str(error)
        return None

    @with_signature
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock stack: token ids [B, S] to hidden states [B, S, E]."""
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        arguments = {name: as_torch(value) for name, value in arguments.items()}
        if self.refusal(**arguments) is not None:
            introduce(type(self), self.config)
            return super().forward(**arguments)
        encoder: Encoder = self._current_engine()
        ids, mask = arguments["input_ids"].to(torch.int64), arguments["attention_mask"]
        output = BaseModelOutput(last_hidden_state=encoder.run(ids, mask))
        return output if wants_dict(self, kwargs.get("return_dict")) else output.to_tuple()


_introduced: set[type] = set()


def introduce(stack_class: type, config: Any) -> None:
    """Let transformers learn which outputs a stack can record: it does when one is constructed,
    and ours took the place of a stock one (or came out of a pickle)."""
    if stack_class not in _introduced:
        with torch.device("meta"):
            stack_class(config)
        _introduced.add(stack_class)


def wants_dict(module: EngineModule, asked: bool | None) -> bool:
    return bool(module.config.return_dict if asked is None else asked)
