"""T5: the graph modules of the whole T5 family, and its Fast classes.

T5 has no biases, RMS norms before each sublayer, unscaled attention, and a bias by bucketed
relative position that the first layer owns and all share (in UMT5 every layer owns one).
"""

from dataclasses import replace

import torch
from onnxscript import nn
from transformers import (
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
)
from transformers.models.t5.modeling_t5 import T5Attention as StockT5Attention
from transformers.models.t5.modeling_t5 import T5Stack

from fastgen.errors import UnsupportedConfigError
from fastgen.graphs.decoder import DecoderRoot, Step
from fastgen.graphs.shape import Shape
from fastgen.models.layers import Embedding, Linear, RMSNorm, WideLinear
from fastgen.ops.standard import Ops
from fastgen.ops.values import Value
from fastgen.tasks.decoder import FastDecoder
from fastgen.tasks.encoder import FastEncoder
from fastgen.tasks.heads import FastTask
from fastgen.tasks.seq2seq import FastSeq2SeqLM

__all__ = [
    "FastT5",
    "FastT5EncoderModel",
    "FastT5ForConditionalGeneration",
    "FastT5ForQuestionAnswering",
    "FastT5ForSequenceClassification",
    "FastT5ForTokenClassification",
    "FastT5Model",
]


class Attention(nn.Module):
    """q, k, v and o; the relative position bias of layers that own one."""

    def __init__(self, config: T5Config, owns_bias: bool = False) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv  # d_kv is free: inner need not equal d_model
        self.heads, self.owns_bias = config.num_heads, owns_bias
        self.q = Linear(config.d_model, inner)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)
        self.o = WideLinear(inner, config.d_model)
        if owns_bias:
            self.relative_attention_bias = PositionTable(config)

    def forward(self, op: Ops, x: Value, bias: Value) -> Value:
        """Encoder self-attention: [B, S, E], [B, H, S, S] -> [B, S, E]."""
        q, k, v = self.q(op, x), self.k(op, x), self.v(op, x)
        return self.o(op, op.attention(q, k, v, bias, self.heads))


class CachedAttention(Attention):
    """Decoder self-attention over KV cache slots, with the position table of that number."""

    def __init__(self, config: T5Config, layer: int, table: int) -> None:
        super().__init__(config, owns_bias=layer == table)
        self.table = table

    def forward(self, op: Ops, x: Value, step: Step) -> Value:
        q, k, v = self.q(op, x), self.k(op, x), self.v(op, x)
        return self.o(op, step.attend(op, q, k, v, self.heads, table=self.table))


class CrossAttention(Attention):
    """Attention over the encoder's hidden states, whose keys and values are computed once."""

    def forward(self, op: Ops, x: Value, step: Step) -> Value:
        return self.o(op, step.attend_source(op, self.q(op, x), self.heads))


class PositionTable(nn.Module):
    """The embedding of relative position buckets, laid out by distance."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter([config.relative_attention_num_buckets, config.num_heads])

    def forward(self, op: Ops, buckets: list[int], future: int | None) -> Value:
        return op.position_table(self.weight, buckets, future)


class FeedForward(nn.Module):
    """DenseReluDense: wo(act(wi(x))), or gated: wo(act(wi_0(x)) * wi_1(x))."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.act, self.gated = config.dense_act_fn, config.is_gated_act
        if self.gated:
            self.wi_0 = Linear(config.d_model, config.d_ff)
            self.wi_1 = Linear(config.d_model, config.d_ff)
        else:
            self.wi = Linear(config.d_model, config.d_ff)
        self.wo = WideLinear(config.d_ff, config.d_model)

    def forward(self, op: Ops, x: Value) -> Value:
        if self.gated:
            hidden = op.activation(self.wi_0(op, x), self.act)
            hidden = op.multiply(hidden, self.wi_1(op, x))
        else:
            hidden = op.activation(self.wi(op, x), self.act)
        return self.wo(op, hidden)


class SelfAttentionLayer(nn.Module):
    def __init__(self, config: T5Config, attention: Attention) -> None:
        super().__init__()
        self.SelfAttention = attention
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class CrossAttentionLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.EncDecAttention = CrossAttention(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class Block(nn.Module):
    """``layer`` holds self-attention, cross-attention (decoder only) and feed-forward."""

    def __init__(self, config: T5Config, sublayers: list[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(sublayers)


def distance_buckets(config: T5Config, bidirectional: bool) -> tuple[list[int], int]:
    """Bucket of each distance key - query, in the index order of ``Ops.position_table``:
    0, 1, ... highest, then lowest ... -1. Also gives the distance at which buckets end.

    Raises:
        UnsupportedConfigError: distances beyond relative_attention_max_distance differ.
    """
    reach = max(config.relative_attention_max_distance, config.relative_attention_num_buckets)
    highest = reach if bidirectional else 1
    distances = [*range(highest + 1), *range(-reach, 0)]
    far = [-reach, -2 * reach, -(10**6)] + [reach, 2 * reach, 10**6] * bidirectional
    fields = (
        f"relative_attention_max_distance={config.relative_attention_max_distance} with "
        f"relative_attention_num_buckets={config.relative_attention_num_buckets}"
    )
    try:
        buckets = StockT5Attention._relative_position_bucket(
            torch.tensor(distances + far),
            bidirectional=bidirectional,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        ).tolist()
    except (ArithmeticError, ValueError) as error:
        raise UnsupportedConfigError(f"{fields}: the stock model fails too: {error}.") from error
    if not 0 <= min(buckets) <= max(buckets) < config.relative_attention_num_buckets:
        raise UnsupportedConfigError(f"{fields}: some distances fall into no bucket.")
    ends = buckets[len(distances) :]
    if len(set(ends[:3])) > 1 or len(set(ends[3:])) > 1:
        raise UnsupportedConfigError(
            f"{fields}: distances beyond the maximum fall into different buckets, which no table "
            "can hold."
        )
    return buckets[: len(distances)], reach


class Encoder(nn.Module):
    """T5Stack as encoder: root module of the encoder graph."""

    def __init__(self, config: T5Config, bias_in_every_layer: bool = False) -> None:
        super().__init__()
        self.buckets, self.reach = distance_buckets(config, bidirectional=True)
        self.depth = config.num_layers
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.block = nn.ModuleList()
        for i in range(config.num_layers):
            attention = Attention(config, owns_bias=bias_in_every_layer or i == 0)
            self.block.append(
                Block(config, [SelfAttentionLayer(config, attention), FeedForwardLayer(config)])
            )
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def encode(
        self,
        op: Ops,
        input_ids: Value,
        attention_mask: Value,
        query_positions: Value,
        key_positions: Value,
    ) -> dict[str, Value]:
        mask = op.mask_bias(attention_mask)
        results: dict[str, Value] = {}
        residual, delta = self.embed_tokens(op, input_ids), None
        for i, block in enumerate(self.block):
            attention, feed_forward = block.layer
            if attention.SelfAttention.owns_bias:
                table = attention.SelfAttention.relative_attention_bias(op, self.buckets, None)
                positions = query_positions, key_positions
                bias = op.position_bias(table, *positions, -self.reach, self.reach)
                bias = op.add(bias, mask)
            residual, x = attention.layer_norm(op, residual, delta)
            results[f"hidden_state.{i}"] = residual
            delta = attention.SelfAttention(op, x, bias)
            residual, x = feed_forward.layer_norm(op, residual, delta)
            delta = feed_forward.DenseReluDense(op, x)
        _, results["last_hidden_state"] = self.final_layer_norm(op, residual, delta)
        return results


class DecoderStack(DecoderRoot):
    """T5Stack as decoder: root module of a decoder without a head."""

    def __init__(self, config: T5Config, bias_in_every_layer: bool = False) -> None:
        super().__init__()
        self.buckets, _ = distance_buckets(config, bidirectional=False)
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.block = nn.ModuleList()
        layers = config.num_decoder_layers
        for i in range(layers):
            attention = CachedAttention(config, i, table=i if bias_in_every_layer else 0)
            sublayers = [
                SelfAttentionLayer(config, attention),
                CrossAttentionLayer(config),
                FeedForwardLayer(config),
            ]
            self.block.append(Block(config, sublayers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        table = 1, config.num_heads, len(self.buckets)
        tables = range(layers if bias_in_every_layer else min(1, layers))
        self.shape = Shape(
            layers=layers,
            heads=config.num_heads,
            head_size=config.d_kv,
            width=config.d_model,
            vocab_size=None,
            tables={f"position_table.{i}": table for i in tables},
        )

    def source(self, op: Ops, encoded: Value) -> list[tuple[Value, Value]]:
        attentions = [block.layer[1].EncDecAttention for block in self.block]
        return [(a.k(op, encoded), a.v(op, encoded)) for a in attentions]

    def tables(self, op: Ops) -> list[Value]:
        owners = [a for block in self.block if (a := block.layer[0].SelfAttention).owns_bias]
        return [a.relative_attention_bias(op, self.buckets, future=1) for a in owners]

    def hidden(self, op: Ops, step: Step) -> Value:
        residual, delta = self.embed_tokens(op, step.ids), None
        for block in self.block:
            attention, cross, feed_forward = block.layer
            residual, x = attention.layer_norm(op, residual, delta)
            step.reads(residual)
            delta = attention.SelfAttention(op, x, step)
            residual, x = cross.layer_norm(op, residual, delta)
            delta = cross.EncDecAttention(op, x, step)
            residual, x = feed_forward.layer_norm(op, residual, delta)
            delta = feed_forward.DenseReluDense(op, x)
        return self.final_layer_norm(op, residual, delta)[1]


class Decoder(DecoderRoot):
    """The decoder and its head: root module of the cross graph and the decoder graph."""

    def __init__(
        self, config: T5Config, scale_outputs: bool, bias_in_every_layer: bool = False
    ) -> None:
        super().__init__()
        self.decoder = DecoderStack(config, bias_in_every_layer)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        self.logits_scale = config.d_model**-0.5 if scale_outputs else 1.0
        self.shape = replace(self.decoder.shape, vocab_size=config.vocab_size)

    def source(self, op: Ops, encoded: Value) -> list[tuple[Value, Value]]:
        return self.decoder.source(op, encoded)

    def tables(self, op: Ops) -> list[Value]:
        return self.decoder.tables(op)

    def hidden(self, op: Ops, step: Step) -> Value:
        return self.decoder.hidden(op, step)

    def head(self, op: Ops, hidden: Value) -> Value:
        return self.lm_head(op, hidden, scale=self.logits_scale)


TRIAL_CONFIG = {
    **{"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 4, "num_layers": 2},
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
}
"""The fields of a config whose models take milliseconds (see ``hf/trial.py``)."""


class FastT5Stack(FastEncoder, T5Stack):
    """The encoder stack, on the engine."""

    _skips_padding = True
    trial_config = TRIAL_CONFIG

    def _encoder_root(self) -> Encoder:
        return Encoder(self.config)


class FastT5DecoderStack(FastDecoder, T5Stack):
    """The decoder stack, on the engine."""

    trial_config = TRIAL_CONFIG | {"is_decoder": True}

    def _decoder_root(self) -> DecoderStack:
        return DecoderStack(self.config)


_STACKS = FastT5Stack, FastT5DecoderStack


class FastT5EncoderModel(FastTask, T5EncoderModel):
    """T5EncoderModel over stacks on compiled engines."""

    _stacks = _STACKS


class FastT5Model(FastTask, T5Model):
    """T5Model over stacks on compiled engines."""

    _stacks = _STACKS


class FastT5ForSequenceClassification(FastTask, T5ForSequenceClassification):
    """T5ForSequenceClassification over stacks on compiled engines."""

    _stacks = _STACKS


class FastT5ForTokenClassification(FastTask, T5ForTokenClassification):
    """T5ForTokenClassification over stacks on compiled engines."""

    _stacks = _STACKS


class FastT5ForQuestionAnswering(FastTask, T5ForQuestionAnswering):
    """T5ForQuestionAnswering over stacks on compiled engines."""

    _stacks = _STACKS


class FastT5ForConditionalGeneration(FastSeq2SeqLM, T5ForConditionalGeneration):
    """T5ForConditionalGeneration on a compiled engine: T5 1.0, 1.1, FLAN-T5, ByT5."""

    trial_config = TRIAL_CONFIG
    _stacks = _STACKS

    def _decoder_root(self) -> Decoder:
        return Decoder(self.config, scale_outputs=self.config.scale_decoder_outputs)


FastT5 = FastT5ForConditionalGeneration
