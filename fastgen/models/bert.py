"""BERT: learned positions, biases, layer norms after each sublayer; its heads are stock code."""

from typing import Any

import torch
from onnxscript import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import BertPooler

from fastgen.errors import UnsupportedConfigError
from fastgen.fallback import Asked
from fastgen.graphs.encoder import POOLED
from fastgen.hf.loading import FastPreTrained
from fastgen.hf.outward import given
from fastgen.models.layers import Embedding, LayerNorm, Linear, Named
from fastgen.ops.standard import Ops
from fastgen.ops.values import Value
from fastgen.tasks.encoder import FastEncoder
from fastgen.tasks.heads import FastTask
from fastgen.tasks.refusals import empty_row_refusal, ends, form_refusal

__all__ = [
    "FastBertForMaskedLM",
    "FastBertForMultipleChoice",
    "FastBertForNextSentencePrediction",
    "FastBertForQuestionAnswering",
    "FastBertForSequenceClassification",
    "FastBertForTokenClassification",
    "FastBertModel",
]

MOST_TOKENS_ON_A_GPU = 2048
"""Of ONNX Runtime, where the fused kernels do not run. Up to here launches cost most, which a
captured graph saves; beyond it its attention takes longer than torch's (BERT-large in bfloat16 on
an H100: 16 x 128 5.7 against 7.7 ms, 24 x 128 8.6 against 7.9, 64 x 128 18.6 against 11.5)."""


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, normed."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, width)
        self.position_embeddings = Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = Embedding(config.type_vocab_size, width)
        self.LayerNorm = LayerNorm(width, config.layer_norm_eps)

    def forward(self, op: Ops, ids: Value, types: Value, positions: Value) -> Value:
        x = op.add(self.word_embeddings(op, ids), self.token_type_embeddings(op, types))
        x = op.add(x, self.position_embeddings(op, positions))
        return self.LayerNorm(op, x, None)[1]


class SelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.scale = (width // self.heads) ** -0.5
        self.query = Linear(width, width, bias=True)
        self.key = Linear(width, width, bias=True)
        self.value = Linear(width, width, bias=True)

    def forward(self, op: Ops, x: Value, bias: Value | None, rows: "Rows") -> Value:
        q, k, v = (rows.spread(op, part(op, x)) for part in (self.query, self.key, self.value))
        return rows.pack(op, op.attention(q, k, v, bias, self.heads, self.scale))


class Rows:
    """How the tokens lie: as rows with their padding, or packed without it."""

    def __init__(self, places: Value | None, tokens: Value | None) -> None:
        self.places, self.tokens = places, tokens

    def spread(self, op: Ops, x: Value) -> Value:
        return x if self.places is None else op.spread(x, self.places)

    def pack(self, op: Ops, x: Value) -> Value:
        return x if self.tokens is None else op.pack(x, self.tokens)


class Output(nn.Module):
    """BertSelfOutput, BertOutput: a product, added to what it began from, and normed."""

    def __init__(self, inputs: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(inputs, config.hidden_size, bias=True)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, op: Ops, x: Value, residual: Value) -> Value:
        return self.LayerNorm(op, residual, self.dense(op, x))[1]


class Intermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.act = config.hidden_act

    def forward(self, op: Ops, x: Value) -> Value:
        return op.activation(self.dense(op, x), self.act)


def layer(config: BertConfig) -> nn.Module:
    """BertLayer."""
    parts = {"self": SelfAttention(config), "output": Output(config.hidden_size, config)}
    return Named(
        attention=Named(**parts),
        intermediate=Intermediate(config),
        output=Output(config.intermediate_size, config),
    )


class Encoder(nn.Module):
    """BertModel without its pooler: root module of the encoder graph."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        if config.is_decoder or config.add_cross_attention:
            raise UnsupportedConfigError(
                "is_decoder or add_cross_attention is true: torch serves BERT as a decoder."
            )
        self.depth = config.num_hidden_layers
        self.embeddings = Embeddings(config)
        self.encoder = Named(layer=nn.ModuleList([layer(config) for _ in range(self.depth)]))

    def encode(
        self,
        op: Ops,
        input_ids: Value,
        token_type_ids: Value,
        query_positions: Value,
        key_positions: Value,
        attention_mask: Value | None = None,
        places: Value | None = None,
        tokens: Value | None = None,
    ) -> dict[str, Value]:
        """Token ids [B, S], or packed ones [1, T] (see ``Rows``), to hidden states."""
        mask = None if attention_mask is None else op.mask_bias(attention_mask)
        bias = None if mask is None else op.for_queries(mask, query_positions)
        rows, results = Rows(places, tokens), {}
        x = self.embeddings(op, input_ids, token_type_ids, key_positions)
        for i, part in enumerate(self.encoder.layer):
            results[f"hidden_state.{i}"] = op.as_residual(x)
            attended = part.attention.self(op, x, bias, rows)
            x = part.attention.output(op, attended, x)
            x = part.output(op, part.intermediate(op, x), x)
        return results | {"last_hidden_state": x}


class Pooler(nn.Module):
    """BertPooler, over the model's own parameters."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.pooler = Named(dense=Linear(width, width, bias=True))

    def pool(self, op: Ops, last_hidden_state: Value) -> dict[str, Value]:
        """Hidden states [B, S, E] -> what is pooled, [B, 1, E]."""
        first = op.rows_kept(last_hidden_state, op.constant([0], torch.int64))
        return {POOLED: op.activation(self.pooler.dense(op, first), "tanh")}


TRIAL_CONFIG = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 32, "max_position_embeddings": 32},
}
"""The fields of a config whose models take milliseconds (see ``hf/trial.py``)."""


class FastBertModel(FastEncoder, FastPreTrained, BertModel):
    """BertModel on a compiled engine; on a GPU its pooler is stock code."""

    trial_config = TRIAL_CONFIG
    pooler: Any
    _more_ids = ("token_type_ids",)
    _packs = True
    _beside = "pooler."

    @property
    def positions(self) -> int:
        known: int = self.config.max_position_embeddings
        return known

    def _encoder_root(self) -> Encoder:
        return Encoder(self.config)

    def _pooler_root(self) -> Pooler | None:
        if type(self.pooler) is not BertPooler:
            return None
        dense, width = self.pooler.dense, self.config.hidden_size
        kinds = type(dense), type(self.pooler.activation)
        stock = kinds == (torch.nn.Linear, torch.nn.Tanh) and dense.weight.shape == (width, width)
        return Pooler(self.config) if stock and dense.bias is not None else None

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a call with these arguments goes to torch; None if the engine serves it."""
        names = "input_ids", "attention_mask", "token_type_ids"
        ids, mask, types = (kwargs.get(name) for name in names)
        if (reason := super().refusal(**kwargs)) or ids is None:
            return reason
        if reason := empty_row_refusal(mask):
            return reason
        engine = self._engine
        fused = engine is not None and engine.fused is not None
        if not fused and (reason := faster_on_torch(self.device, *ids.shape)):
            return reason
        return None if types is None else self._types_refusal(types, ids)

    def _types_refusal(self, types: Any, ids: torch.Tensor) -> str | None:
        if reason := form_refusal("token_type_ids", types, self):
            return reason
        if types.shape != ids.shape:
            shapes = f"{list(types.shape)}, not {list(ids.shape)}"
            return Asked(f"token_type_ids are {shapes}: one per token")
        count = self.config.type_vocab_size
        if types.device.type == "cpu":
            low, high = ends(types)
            if low < 0 or high >= count:
                return Asked(f"token_type_ids are not all in 0 .. {count - 1}")
        return None

    def _output(self, hidden: torch.Tensor) -> Any:
        pooled, hidden = self._pooled(hidden), given(self, hidden)
        if pooled is not None:
            pooled = given(self, pooled)
        elif self.pooler is not None:
            pooled = self.pooler(hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden, pooler_output=pooled
        )


class FastBertForSequenceClassification(FastTask, BertForSequenceClassification):
    """BertForSequenceClassification over a BertModel on a compiled engine."""

    _stacks = (FastBertModel,)


class FastBertForTokenClassification(FastTask, BertForTokenClassification):
    """BertForTokenClassification over a BertModel on a compiled engine."""

    _stacks = (FastBertModel,)


class FastBertForQuestionAnswering(FastTask, BertForQuestionAnswering):
    """BertForQuestionAnswering over a BertModel on a compiled engine: computes padding too, as
    answers are chosen among all tokens."""

    _stacks = (FastBertModel,)
    _reads_padding = True


class FastBertForMaskedLM(FastTask, BertForMaskedLM):
    """BertForMaskedLM over a BertModel on a compiled engine."""

    _stacks = (FastBertModel,)


class FastBertForNextSentencePrediction(FastTask, BertForNextSentencePrediction):
    """BertForNextSentencePrediction over a BertModel on a compiled engine."""

    _stacks = (FastBertModel,)


class FastBertForMultipleChoice(FastTask, BertForMultipleChoice):
    """BertForMultipleChoice over a BertModel on a compiled engine."""

    _stacks = (FastBertModel,)

    def refusal(self, **kwargs: Any) -> str | None:
        """See ``FastTask.refusal``; arguments are [B, choices, S]."""
        return super().refusal(**{name: _flat(value) for name, value in kwargs.items()})


def faster_on_torch(device: torch.device, batch: int, length: int) -> str | None:
    """Why torch serves so many tokens [B, S] sooner; None if it does not."""
    if device.type != "cuda" or batch * length <= MOST_TOKENS_ON_A_GPU:
        return None
    size = f"{batch} x {length} tokens are more than {MOST_TOKENS_ON_A_GPU}"
    return Asked(f"{size}, where torch's attention is faster on a GPU")


def _flat(value: Any) -> Any:
    """As the head hands it to its model: rows of all choices."""
    three = isinstance(value, torch.Tensor) and value.ndim == 3
    return value.flatten(0, 1) if three else value
