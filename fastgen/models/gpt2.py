"""GPT-2: learned positions, biases, layer norms before each sublayer, [in, out] weights."""

from typing import Any

import torch
from onnxscript import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)

from fastgen.errors import UnsupportedConfigError
from fastgen.fallback import Asked
from fastgen.graphs.decoder import DecoderRoot, Step
from fastgen.graphs.encoder import WholeRows
from fastgen.graphs.shape import LAST_STATE, Shape
from fastgen.hf.loading import FastPreTrained
from fastgen.hf.outward import given
from fastgen.models.layers import Conv1D, Embedding, LayerNorm, Linear
from fastgen.ops.standard import Ops
from fastgen.ops.values import Value
from fastgen.tasks.causal import FastCausalLM
from fastgen.tasks.encoder import FastEncoder
from fastgen.tasks.heads import FastTask
from fastgen.tasks.refusals import empty_row_refusal

__all__ = [
    "FastGPT2ForSequenceClassification",
    "FastGPT2ForTokenClassification",
    "FastGPT2LMHeadModel",
    "FastGPT2Model",
]


class Attention(nn.Module):
    """Self-attention; one matrix gives q, k and v."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.heads = config.n_head
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, op: Ops, x: Value, step: Step | WholeRows) -> Value:
        q, k, v = op.split(self.c_attn(op, x), 3)
        return self.c_proj(op, step.attend(op, q, k, v, self.heads, self.scale))


class FeedForward(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.act = config.activation_function
        self.c_fc = Conv1D(config.n_embd, inner)
        self.c_proj = Conv1D(inner, config.n_embd)

    def forward(self, op: Ops, x: Value) -> Value:
        return self.c_proj(op, op.activation(self.c_fc(op, x), self.act))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = FeedForward(config)


class Stack(nn.Module):
    """GPT2Model: root module of the encoder graph, for heads that read all tokens at once."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        if config.add_cross_attention:
            raise UnsupportedConfigError(
                "add_cross_attention=True: the engine has no source for it."
            )
        if config.reorder_and_upcast_attn and config._attn_implementation == "eager":
            raise UnsupportedConfigError(
                "reorder_and_upcast_attn=True with eager attention: the engine does not reorder."
            )
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.depth = config.n_layer

    def hidden(self, op: Ops, step: Step | WholeRows) -> Value:
        residual = op.add(self.wte(op, step.ids), self.wpe(op, step.positions))
        delta = None
        for block in self.h:
            residual, x = block.ln_1(op, residual, delta)
            step.reads(residual)
            delta = block.attn(op, x, step)
            residual, x = block.ln_2(op, residual, delta)
            delta = block.mlp(op, x)
        _, hidden = self.ln_f(op, residual, delta)
        return hidden

    def encode(self, op: Ops, **inputs: Value) -> dict[str, Value]:
        """The encoder graph: token ids [B, S], or packed ones [1, T], to hidden states."""
        rows = WholeRows(op, **inputs)
        return {LAST_STATE: self.hidden(op, rows)} | rows.results


class Decoder(DecoderRoot):
    """The stack and its head: root module of the decoder graph."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.transformer = Stack(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.shape = Shape(
            layers=config.n_layer,
            heads=config.n_head,
            head_size=config.n_embd // config.n_head,
            width=config.n_embd,
            vocab_size=config.vocab_size,
            tables={},
            source=False,
        )

    def hidden(self, op: Ops, step: Step) -> Value:
        hidden: Value = self.transformer.hidden(op, step)
        return hidden

    def head(self, op: Ops, hidden: Value) -> Value:
        return self.lm_head(op, hidden)


TRIAL_CONFIG = {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 32}
"""The fields of a config whose models take milliseconds (see ``hf/trial.py``)."""


class FastGPT2LMHeadModel(FastCausalLM, GPT2LMHeadModel):
    """GPT2LMHeadModel on a compiled engine."""

    trial_config = TRIAL_CONFIG
    _output = CausalLMOutputWithCrossAttentions
    _position_table = "transformer.wpe"

    def _decoder_root(self) -> Decoder:
        return Decoder(self.config)


KEPT = Asked("use_cache=True: only torch and FastGPT2LMHeadModel keep keys and values")


class FastGPT2Model(FastEncoder, FastPreTrained, GPT2Model):
    """GPT2Model on a compiled engine, which computes hidden states of all tokens and keeps no keys
    and values: a call that asks for them (``use_cache=True``) is torch's."""

    trial_config = TRIAL_CONFIG
    wpe: Any
    _packs = True

    @property
    def positions(self) -> int:
        return len(self.wpe.weight)

    def _encoder_root(self) -> Stack:
        return Stack(self.config)

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a call with these arguments goes to torch; None if the engine serves it."""
        if kwargs.get("use_cache"):
            return KEPT
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if (reason := super().refusal(**kwargs)) or ids is None:
            return reason
        return empty_row_refusal(mask)

    def _output(self, hidden: torch.Tensor) -> Any:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=given(self, hidden))


class _Task(FastTask):
    _stacks = (FastGPT2Model,)

    def stacks_refusal(self, **kwargs: Any) -> str | None:
        """See ``FastPreTrained.stacks_refusal``; the stack is told of ``use_cache``, too."""
        return KEPT if kwargs.get("use_cache") else super().stacks_refusal(**kwargs)


class FastGPT2ForSequenceClassification(_Task, GPT2ForSequenceClassification):
    """GPT2ForSequenceClassification over a GPT2Model on a compiled engine: computes padding too, as
    a row's last token is found by its id, whatever the mask says."""

    _reads_padding = True


class FastGPT2ForTokenClassification(_Task, GPT2ForTokenClassification):
    """GPT2ForTokenClassification over a GPT2Model on a compiled engine."""
