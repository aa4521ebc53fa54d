"""Llama and Qwen3 as families would be: rotary positions, grouped queries, norms of heads. Tests
run them through the machinery of decoder-only models; the package has no such family yet."""

from typing import Any

import torch
from onnxscript import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastgen.graphs.decoder import DecoderRoot, Step
from fastgen.graphs.shape import Shape
from fastgen.models.layers import Embedding, Linear, RMSNorm
from fastgen.ops.standard import Ops
from fastgen.ops.values import Angles, Value
from fastgen.tasks.causal import FastCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


class HeadNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter([size])
        self.eps = eps

    def forward(self, op: Ops, x: Value) -> Value:
        return op.head_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Any, norms: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        size, width, bias = config.head_dim, config.hidden_size, config.attention_bias
        self.scale = size**-0.5
        self.q_proj = Linear(width, self.heads * size, bias)
        self.k_proj = Linear(width, self.kv_heads * size, bias)
        self.v_proj = Linear(width, self.kv_heads * size, bias)
        self.o_proj = Linear(self.heads * size, width, bias)
        if norms:
            self.q_norm = HeadNorm(size, config.rms_norm_eps)
            self.k_norm = HeadNorm(size, config.rms_norm_eps)
        self.norms = norms

    def forward(self, op: Ops, x: Value, step: Step, angles: Angles) -> Value:
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        if self.norms:
            q, k = self.q_norm(op, q), self.k_norm(op, k)
        q, k = op.rotary(q, angles, self.heads), op.rotary(k, angles, self.kv_heads)
        return self.o_proj(op, step.attend(op, q, k, v, self.heads, self.scale))


class FeedForward(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.act = config.hidden_act
        self.gate_proj, self.up_proj = Linear(*sizes), Linear(*sizes)
        self.down_proj = Linear(*reversed(sizes))

    def forward(self, op: Ops, x: Value) -> Value:
        hidden = op.activation(self.gate_proj(op, x), self.act)
        return self.down_proj(op, op.multiply(hidden, self.up_proj(op, x)))


class Block(nn.Module):
    def __init__(self, config: Any, norms: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, norms)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Stack(nn.Module):
    def __init__(self, config: Any, norms: bool) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList([Block(config, norms) for _ in range(depth)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(DecoderRoot):
    """Root module of the decoder graph."""

    def __init__(self, config: Any, norms: bool) -> None:
        super().__init__()
        with torch.device("cpu"):
            rotary = LlamaRotaryEmbedding(config)
        self.frequencies, self.turns = rotary.inv_freq.tolist(), rotary.attention_scaling
        self.model = Stack(config, norms)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.shape = Shape(
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            head_size=config.head_dim,
            width=config.hidden_size,
            vocab_size=config.vocab_size,
            tables={},
            source=False,
            kv_heads=config.num_key_value_heads,
        )

    def hidden(self, op: Ops, step: Step) -> Value:
        residual, delta = self.model.embed_tokens(op, step.ids), None
        angles = op.rotary_angles(step.positions, self.frequencies, self.turns)
        for layer in self.model.layers:
            residual, x = layer.input_layernorm(op, residual, delta)
            step.reads(residual)
            delta = layer.self_attn(op, x, step, angles)
            residual, x = layer.post_attention_layernorm(op, residual, delta)
            delta = layer.mlp(op, x)
        _, hidden = self.model.norm(op, residual, delta)
        return hidden

    def head(self, op: Ops, hidden: Value) -> Value:
        return self.lm_head(op, hidden)


class FastLlamaForCausalLM(FastCausalLM, LlamaForCausalLM):
    """LlamaForCausalLM on a compiled engine."""

    def _decoder_root(self) -> Decoder:
        return Decoder(self.config, norms=False)


class FastQwen3ForCausalLM(FastCausalLM, Qwen3ForCausalLM):
    """Qwen3ForCausalLM on a compiled engine."""

    def _decoder_root(self) -> Decoder:
        return Decoder(self.config, norms=True)


FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "Llama": (LlamaConfig, LlamaForCausalLM, FastLlamaForCausalLM),
    "Qwen3": (Qwen3Config, Qwen3ForCausalLM, FastQwen3ForCausalLM),
}


def pair(family: str, kv_heads: int, **fields: Any) -> tuple[Any, Any]:
    """A stock and a Fast model with the same random weights, which bfloat16 holds."""
    kind, stock_class, fast_class = FAMILIES[family]
    torch.manual_seed(0)
    config = kind(**TINY | {"num_key_value_heads": kv_heads} | fields)
    stock = stock_class(config).eval()
    for name, parameter in stock.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else 2 * parameter.shape[-1] ** -0.5
        noise = scale * torch.randn_like(parameter) + ("norm" in name)
        parameter.data = noise.bfloat16().float()
    fast = fast_class(kind(**config.to_dict())).eval()
    fast.load_state_dict(stock.state_dict())
    return stock, fast
