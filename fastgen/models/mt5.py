"""mT5: T5 1.1 under another ``model_type``."""

from transformers import MT5EncoderModel, MT5ForConditionalGeneration
from transformers.models.mt5.modeling_mt5 import MT5Stack

from fastgen.modeling_seq2seq import FastEncoder, FastEncoderModel, FastSeq2SeqLM
from fastgen.models.t5 import TRIAL_CONFIG, Decoder, Encoder


class FastMT5Stack(FastEncoder, MT5Stack):
    """The encoder stack, on the engine."""

    trial_config = TRIAL_CONFIG

    def _encoder_root(self) -> Encoder:
        return Encoder(self.config)


class FastMT5EncoderModel(FastEncoderModel, MT5EncoderModel):
    """MT5EncoderModel on a compiled engine."""

    _stack_class = FastMT5Stack


class FastMT5ForConditionalGeneration(FastSeq2SeqLM, MT5ForConditionalGeneration):
    """MT5ForConditionalGeneration on a compiled engine."""

    trial_config = TRIAL_CONFIG
    _stack_class = FastMT5Stack

    def _decoder_root(self) -> Decoder:
        return Decoder(self.config, scale_outputs=False)
