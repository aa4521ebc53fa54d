"""UMT5: T5 1.1 whose every layer owns a relative position bias."""

from transformers import UMT5EncoderModel, UMT5ForConditionalGeneration
from transformers.models.umt5.modeling_umt5 import UMT5Stack

from fastgen.hf import contract
from fastgen.modeling_seq2seq import FastEncoder, FastEncoderModel, FastSeq2SeqLM
from fastgen.models.t5 import TRIAL_CONFIG, Decoder, Encoder


class FastUMT5Stack(FastEncoder, UMT5Stack):
    """The encoder stack, on the engine."""

    trial_config = TRIAL_CONFIG

    def _encoder_root(self) -> Encoder:
        return Encoder(self.config, bias_in_every_layer=True)


class FastUMT5EncoderModel(FastEncoderModel, UMT5EncoderModel):
    """UMT5EncoderModel on a compiled engine."""

    _stack_class = FastUMT5Stack


class FastUMT5ForConditionalGeneration(FastSeq2SeqLM, UMT5ForConditionalGeneration):
    """UMT5ForConditionalGeneration on a compiled engine."""

    trial_config = TRIAL_CONFIG
    _stack_class = FastUMT5Stack

    def _decoder_root(self) -> Decoder:
        scaled = contract.scales_umt5_logits(self.config)
        return Decoder(self.config, scale_outputs=scaled, bias_in_every_layer=True)
