"""GPT-2: learned positions, biases, layer norms before each sublayer, [in, out] weights."""

from onnxscript import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from fastgen.errors import UnsupportedConfigError
from fastgen.graphs.decoder import DecoderRoot, Step
from fastgen.graphs.shape import Shape
from fastgen.models.layers import Conv1D, Embedding, LayerNorm, Linear
from fastgen.ops.standard import Ops
from fastgen.ops.values import Value
from fastgen.tasks.causal import FastCausalLM

__all__ = ["FastGPT2LMHeadModel"]


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

    def forward(self, op: Ops, x: Value, step: Step) -> Value:
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
    """GPT2Model."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)


class Decoder(DecoderRoot):
    """The stack and its head: root module of the decoder graph."""

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
        stack = self.transformer
        residual = op.add(stack.wte(op, step.ids), stack.wpe(op, step.positions))
        delta = None
        for block in stack.h:
            residual, x = block.ln_1(op, residual, delta)
            step.reads(residual)
            delta = block.attn(op, x, step)
            residual, x = block.ln_2(op, residual, delta)
            delta = block.mlp(op, x)
        _, hidden = stack.ln_f(op, residual, delta)
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
