"""mT5: T5 1.1 under another ``model_type``."""

from transformers import (
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    MT5ForQuestionAnswering,
    MT5ForSequenceClassification,
    MT5ForTokenClassification,
    MT5Model,
)
from transformers.models.mt5.modeling_mt5 import MT5Stack

from fastgen.models.t5 import TRIAL_CONFIG, Decoder, DecoderStack, Encoder
from fastgen.tasks.decoder import FastDecoder
from fastgen.tasks.encoder import FastEncoder
from fastgen.tasks.heads import FastTask
from fastgen.tasks.seq2seq import FastSeq2SeqLM

__all__ = [
    "FastMT5EncoderModel",
    "FastMT5ForConditionalGeneration",
    "FastMT5ForQuestionAnswering",
    "FastMT5ForSequenceClassification",
    "FastMT5ForTokenClassification",
    "FastMT5Model",
]


class FastMT5Stack(FastEncoder, MT5Stack):
    """The encoder stack, on the engine."""

    _skips_padding = True
    trial_config = TRIAL_CONFIG

    def _encoder_root(self) -> Encoder:
        return Encoder(self.config)


class FastMT5DecoderStack(FastDecoder, MT5Stack):
    """The decoder stack, on the engine."""

    trial_config = TRIAL_CONFIG | {"is_decoder": True}

    def _decoder_root(self) -> DecoderStack:
        return DecoderStack(self.config)


_STACKS = FastMT5Stack, FastMT5DecoderStack


class FastMT5EncoderModel(FastTask, MT5EncoderModel):
    """MT5EncoderModel over stacks on compiled engines."""

    _stacks = _STACKS


class FastMT5Model(FastTask, MT5Model):
    """MT5Model over stacks on compiled engines."""

    _stacks = _STACKS


class FastMT5ForSequenceClassification(FastTask, MT5ForSequenceClassification):
    """MT5ForSequenceClassification over stacks on compiled engines."""

    _stacks = _STACKS


class FastMT5ForTokenClassification(FastTask, MT5ForTokenClassification):
    """MT5ForTokenClassification over stacks on compiled engines."""

    _stacks = _STACKS


class FastMT5ForQuestionAnswering(FastTask, MT5ForQuestionAnswering):
    """MT5ForQuestionAnswering over stacks on compiled engines."""

    _stacks = _STACKS


class FastMT5ForConditionalGeneration(FastSeq2SeqLM, MT5ForConditionalGeneration):
    """MT5ForConditionalGeneration on a compiled engine."""

    trial_config = TRIAL_CONFIG
    _stacks = _STACKS

    def _decoder_root(self) -> Decoder:
        return Decoder(self.config, scale_outputs=False)
