"""UMT5: T5 1.1 whose every layer owns a relative position bias."""

from typing import Any

from transformers import (
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
    UMT5ForQuestionAnswering,
    UMT5ForSequenceClassification,
    UMT5ForTokenClassification,
    UMT5Model,
)
from transformers.models.umt5.modeling_umt5 import UMT5Stack

from fastgen.hf import contract
from fastgen.models.t5 import TRIAL_CONFIG, Decoder, DecoderStack, Encoder
from fastgen.tasks.decoder import FastDecoder
from fastgen.tasks.encoder import FastEncoder
from fastgen.tasks.heads import FastTask
from fastgen.tasks.seq2seq import FastSeq2SeqLM

__all__ = [
    "FastUMT5EncoderModel",
    "FastUMT5ForConditionalGeneration",
    "FastUMT5ForQuestionAnswering",
    "FastUMT5ForSequenceClassification",
    "FastUMT5ForTokenClassification",
    "FastUMT5Model",
]


class FastUMT5Stack(FastEncoder, UMT5Stack):
    """The encoder stack, on the engine."""

    _skips_padding = True
    trial_config = TRIAL_CONFIG

    def _encoder_root(self) -> Encoder:
        return Encoder(self.config, bias_in_every_layer=True)


class FastUMT5DecoderStack(FastDecoder, UMT5Stack):
    """The decoder stack, on the engine."""

    trial_config = TRIAL_CONFIG | {"is_decoder": True}

    def _decoder_root(self) -> DecoderStack:
        return DecoderStack(self.config, bias_in_every_layer=True)

    def refusal(self, **kwargs: Any) -> str | None:
        return contract.umt5_refusal(kwargs.get("input_ids")) or super().refusal(**kwargs)


_STACKS = FastUMT5Stack, FastUMT5DecoderStack


class FastUMT5EncoderModel(FastTask, UMT5EncoderModel):
    """UMT5EncoderModel over stacks on compiled engines."""

    _stacks = _STACKS


class FastUMT5Model(FastTask, UMT5Model):
    """UMT5Model over stacks on compiled engines."""

    _stacks = _STACKS


class FastUMT5ForSequenceClassification(FastTask, UMT5ForSequenceClassification):
    """UMT5ForSequenceClassification over stacks on compiled engines."""

    _stacks = _STACKS


class FastUMT5ForTokenClassification(FastTask, UMT5ForTokenClassification):
    """UMT5ForTokenClassification over stacks on compiled engines."""

    _stacks = _STACKS


class FastUMT5ForQuestionAnswering(FastTask, UMT5ForQuestionAnswering):
    """UMT5ForQuestionAnswering over stacks on compiled engines."""

    _stacks = _STACKS


class FastUMT5ForConditionalGeneration(FastSeq2SeqLM, UMT5ForConditionalGeneration):
    """UMT5ForConditionalGeneration on a compiled engine."""

    trial_config = TRIAL_CONFIG
    _stacks = _STACKS

    def _decoder_root(self) -> Decoder:
        scaled = contract.scales_umt5_logits(self.config)
        return Decoder(self.config, scale_outputs=scaled, bias_in_every_layer=True)

    def refusal(self, **kwargs: Any) -> str | None:
        ids = kwargs.get("decoder_input_ids")
        return contract.umt5_refusal(ids) or super().refusal(**kwargs)
