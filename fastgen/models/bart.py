"""BART: learned positions, biases, layer norms after each sublayer; but for the language model's,
its heads are stock code."""

from dataclasses import replace
from typing import Any

from onnxscript import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForQuestionAnswering,
    BartForSequenceClassification,
    BartModel,
)
from transformers.models.bart.modeling_bart import BartDecoder, BartEncoder

from fastgen.graphs.decoder import DecoderRoot, Step
from fastgen.graphs.shape import Shape
from fastgen.models.layers import Embedding, LayerNorm, Linear, Named
from fastgen.ops.standard import Ops
from fastgen.ops.values import Value
from fastgen.tasks.decoder import FastDecoder
from fastgen.tasks.encoder import FastEncoder
from fastgen.tasks.heads import FastTask
from fastgen.tasks.seq2seq import FastSeq2SeqLM

__all__ = [
    "FastBartForConditionalGeneration",
    "FastBartForQuestionAnswering",
    "FastBartForSequenceClassification",
    "FastBartModel",
]

_OFFSET = 2  # rows of a table of positions before that of position 0
_EPS = 1e-5  # of torch.nn.LayerNorm


class Attention(nn.Module):
    def __init__(self, config: BartConfig, heads: int) -> None:
        super().__init__()
        width = config.d_model
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.k_proj = Linear(width, width, bias=True)
        self.v_proj = Linear(width, width, bias=True)
        self.q_proj = Linear(width, width, bias=True)
        self.out_proj = Linear(width, width, bias=True)

    def forward(self, op: Ops, x: Value, bias: Value) -> Value:
        """Of an encoder: [B, S, E] and an additive bias [B, 1, S, S] -> [B, S, E]."""
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        return self.out_proj(op, op.attention(q, k, v, bias, self.heads, self.scale))

    def cached(self, op: Ops, x: Value, step: Step) -> Value:
        """Of a decoder, over the tokens so far."""
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        return self.out_proj(op, step.attend(op, q, k, v, self.heads, self.scale))

    def over_source(self, op: Ops, x: Value, step: Step) -> Value:
        y = step.attend_source(op, self.q_proj(op, x), self.heads, self.scale)
        return self.out_proj(op, y)


class Layer(nn.Module):
    """An encoder's layer, or with ``cross`` a decoder's."""

    def __init__(self, config: BartConfig, heads: int, inner: int, cross: bool = False) -> None:
        super().__init__()
        width, self.act = config.d_model, config.activation_function
        self.self_attn = Attention(config, heads)
        self.self_attn_layer_norm = LayerNorm(width, _EPS)
        if cross:
            self.encoder_attn = Attention(config, heads)
            self.encoder_attn_layer_norm = LayerNorm(width, _EPS)
        self.fc1 = Linear(width, inner, bias=True)
        self.fc2 = Linear(inner, width, bias=True)
        self.final_layer_norm = LayerNorm(width, _EPS)

    def feed_forward(self, op: Ops, x: Value) -> Value:
        y = self.fc2(op, op.activation(self.fc1(op, x), self.act))
        return self.final_layer_norm(op, x, y)[1]


class Stack(nn.Module):
    """What encoder and decoder share: sums of token and position embeddings, normed."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        width, scale = config.d_model, config.d_model**0.5 if config.scale_embedding else 1.0
        self.embed_tokens = Embedding(config.vocab_size, width, scale)
        self.embed_positions = Embedding(config.max_position_embeddings, width, offset=_OFFSET)
        self.layernorm_embedding = LayerNorm(width, _EPS)

    def embed(self, op: Ops, ids: Value, positions: Value) -> Value:
        x = op.add(self.embed_tokens(op, ids), self.embed_positions(op, positions))
        return self.layernorm_embedding(op, x, None)[1]


class Encoder(Stack):
    """BartEncoder: root module of the encoder graph."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        sizes = config.encoder_attention_heads, config.encoder_ffn_dim
        self.depth = config.encoder_layers
        self.layers = nn.ModuleList([Layer(config, *sizes) for _ in range(self.depth)])

    def encode(
        self,
        op: Ops,
        input_ids: Value,
        attention_mask: Value,
        query_positions: Value,
        key_positions: Value,
    ) -> dict[str, Value]:
        """Token ids [B, S] to hidden states."""
        bias = op.for_queries(op.mask_bias(attention_mask), query_positions)
        x, results = self.embed(op, input_ids, key_positions), {}
        for i, layer in enumerate(self.layers):
            results[f"hidden_state.{i}"] = op.as_residual(x)
            x = layer.self_attn_layer_norm(op, x, layer.self_attn(op, x, bias))[1]
            x = layer.feed_forward(op, x)
        return results | {"last_hidden_state": x}


class DecoderStack(Stack, DecoderRoot):
    """BartDecoder: root module of a decoder without a head."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        heads, inner = config.decoder_attention_heads, config.decoder_ffn_dim
        layers = [Layer(config, heads, inner, cross=True) for _ in range(config.decoder_layers)]
        self.layers = nn.ModuleList(layers)
        self.shape = Shape(
            layers=config.decoder_layers,
            heads=heads,
            head_size=config.d_model // heads,
            width=config.d_model,
            vocab_size=None,
            tables={},
        )

    def source(self, op: Ops, encoded: Value) -> list[tuple[Value, Value]]:
        attentions = [layer.encoder_attn for layer in self.layers]
        return [(a.k_proj(op, encoded), a.v_proj(op, encoded)) for a in attentions]

    def hidden(self, op: Ops, step: Step) -> Value:
        x = self.embed(op, step.ids, step.positions)
        for layer in self.layers:
            step.reads(op.as_residual(x))
            x = layer.self_attn_layer_norm(op, x, layer.self_attn.cached(op, x, step))[1]
            attended = layer.encoder_attn.over_source(op, x, step)
            x = layer.encoder_attn_layer_norm(op, x, attended)[1]
            x = layer.feed_forward(op, x)
        return x


class Decoder(DecoderRoot):
    """The decoder and its head: root module of the cross graph and the decoder graph."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.model = Named(decoder=DecoderStack(config))
        self.lm_head = Linear(config.d_model, config.vocab_size)
        self.final_logits_bias = nn.Parameter([1, config.vocab_size])
        self.shape = replace(self.model.decoder.shape, vocab_size=config.vocab_size)

    def source(self, op: Ops, encoded: Value) -> list[tuple[Value, Value]]:
        return self.model.decoder.source(op, encoded)

    def hidden(self, op: Ops, step: Step) -> Value:
        return self.model.decoder.hidden(op, step)

    def head(self, op: Ops, hidden: Value) -> Value:
        return op.linear(hidden, self.lm_head.weight, self.final_logits_bias)


TRIAL_CONFIG = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
}
"""The fields of a config whose models take milliseconds (see ``hf/trial.py``)."""


def known_positions(stack: Any) -> int:
    """How many tokens a row may have, whatever the config says of them."""
    return len(stack.embed_positions.weight) - _OFFSET


class FastBartEncoder(FastEncoder, BartEncoder):
    """BartEncoder on a compiled engine."""

    trial_config = TRIAL_CONFIG

    @property
    def positions(self) -> int:
        return known_positions(self)

    def _encoder_root(self) -> Encoder:
        return Encoder(self.config)


class FastBartDecoder(FastDecoder, BartDecoder):
    """BartDecoder on a compiled engine."""

    trial_config = TRIAL_CONFIG | {"is_decoder": True}

    @property
    def positions(self) -> int:
        return known_positions(self)

    def _decoder_root(self) -> DecoderStack:
        return DecoderStack(self.config)


_STACKS = FastBartEncoder, FastBartDecoder


class FastBartModel(FastTask, BartModel):
    """BartModel over stacks on compiled engines."""

    _stacks = _STACKS


class FastBartForSequenceClassification(FastTask, BartForSequenceClassification):
    """BartForSequenceClassification over stacks on compiled engines."""

    _stacks = _STACKS


class FastBartForQuestionAnswering(FastTask, BartForQuestionAnswering):
    """BartForQuestionAnswering over stacks on compiled engines."""

    _stacks = _STACKS


class FastBartForConditionalGeneration(FastSeq2SeqLM, BartForConditionalGeneration):
    """BartForConditionalGeneration on a compiled engine."""

    trial_config = TRIAL_CONFIG
    _stacks = _STACKS
    _inside = "model."
    _shifts_sources = True

    def _decoder_root(self) -> Decoder:
        return Decoder(self.config)

    def _forward(self, **arguments: Any) -> Any:
        if arguments.get("labels") is not None:  # in training there are no further tokens
            arguments["use_cache"] = False
        return super()._forward(**arguments)
