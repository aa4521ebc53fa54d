"""Tiny models of every supported family: one line here gives a family all the parity tests.

A variant is the name of a stock transformers class plus the config fields that differ from
`TINY`. The Fast class of the same name with "Fast" in front is compared with it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import fastgen

#: Small enough for a `generate` call of some 10 ms; head size and heads do not multiply to d_model.
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

#: The same for models without an encoder; positions for prompts and 72 new tokens.
TINY_DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 96,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


#: The same for BART, whose decoder begins with the end token.
TINY_BART: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}


@dataclass(frozen=True)
class Variant:
    """A tiny model: the stock class's name, the config fields that differ, tied embeddings or not.

    The seed of the random weights is one whose greedy decoding is eventful (see `build_stock`).
    """

    stock: str
    changes: dict[str, Any] = field(default_factory=dict)
    tied: bool = True
    seed: int = 0
    tiny: Mapping[str, Any] = field(default_factory=lambda: TINY)


T5, MT5, UMT5 = (f"{name}ForConditionalGeneration" for name in ("T5", "MT5", "UMT5"))
BART = functools.partial(Variant, "BartForConditionalGeneration", tiny=TINY_BART)
#: What T5 1.1 and FLAN-T5 checkpoints say: gated GELU, a head of its own, logits not scaled.
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

VARIANTS: dict[str, Variant] = {
    "t5-1.0": Variant(T5, seed=16),
    "t5-1.1": Variant(T5, V1_1, tied=False, seed=14),
    "flan": Variant(T5, V1_1 | {"d_kv": 16, "num_layers": 3, "num_heads": 2}, tied=False, seed=9),
    "byt5": Variant(
        T5, V1_1 | {"vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1}, seed=6
    ),
    "mt5": Variant(MT5, tied=False, seed=37),
    "umt5": Variant(UMT5, seed=21),
    "t5-wide-heads": Variant(T5, {"d_kv": 20, "num_heads": 3}, seed=68),
    "t5-shallow-decoder": Variant(T5, {"num_layers": 3, "num_decoder_layers": 1}, seed=7),
    "t5-deep-decoder": Variant(T5, {"num_layers": 1, "num_decoder_layers": 3}, seed=3),
    "t5-buckets": Variant(
        T5, {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 9}, seed=102
    ),
    "t5-epsilon": Variant(
        T5, {"layer_norm_epsilon": 0.05, "feed_forward_proj": "gated-silu"}, seed=1
    ),
    "t5-tied-unscaled": Variant(
        T5, {"tie_word_embeddings": False, "feed_forward_proj": "gelu"}, seed=39
    ),
    "t5-untied-scaled": Variant(T5, {"feed_forward_proj": "gated-relu"}, tied=False, seed=2),
    "bart": BART(seed=137),
    "bart-scales": BART(
        {
            **{"scale_embedding": True, "activation_function": "relu", "decoder_layers": 1},
            **{"encoder_attention_heads": 2, "forced_bos_token_id": 2},
        },
        seed=151,
    ),
    "bart-sizes": BART(
        {
            **{"encoder_layers": 1, "decoder_layers": 2, "decoder_attention_heads": 8},
            **{"tie_word_embeddings": False, "decoder_start_token_id": 2},
            **{"forced_eos_token_id": None},
        },
        tied=False,
        seed=37,
    ),
}

GPT2 = functools.partial(Variant, "GPT2LMHeadModel", tiny=TINY_DECODER)
#: Models without an encoder, and how each variant computes differently.
DECODERS: dict[str, Variant] = {
    "gpt2": GPT2(seed=106),
    "gpt2-scales": GPT2(
        {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "n_layer": 3},
        seed=147,
    ),
    "gpt2-sizes": GPT2(
        {
            **{"n_inner": 48, "n_head": 2, "activation_function": "relu"},
            **{"layer_norm_epsilon": 0.05, "tie_word_embeddings": False},
        },
        tied=False,
        seed=3,
    ),
}
EVERY = VARIANTS | DECODERS


def stock_class(name: str) -> type[PreTrainedModel]:
    """The stock transformers class of a variant."""
    return getattr(transformers, EVERY[name].stock)


def fast_class(name: str) -> type[PreTrainedModel]:
    """The Fast class of a variant."""
    return getattr(fastgen, f"Fast{EVERY[name].stock}")


def build_stock(name: str) -> PreTrainedModel:
    """A stock model in fp32 on the CPU with random weights that make decoding eventful.

    The library's own initialisation makes greedy decoding repeat one token. Here the embeddings
    are small and the layers and position biases strong, so that the next token depends on the
    position and the whole past; the logits spread by 2.5; and the row of eos is longer than the
    others, so that sequences end at different steps.
    """
    variant, stock = EVERY[name], stock_class(name)
    model = stock(stock.config_class(**({**variant.tiny} | variant.changes))).eval()
    if name in DECODERS:
        return _eventful_decoder(model, variant.seed)
    if variant.stock.startswith("Bart"):
        return _eventful_bart(model, variant)
    if not variant.tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    generator = torch.Generator().manual_seed(variant.seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layer_norm" in key:
                noise = 1 + 0.2 * noise
            elif "relative_attention_bias" in key:
                noise = 4 * noise
            elif key in ("shared.weight", "lm_head.weight"):
                noise = 0.1 * noise
            else:
                noise = 2 * parameter.shape[1] ** -0.5 * noise
            if key.endswith(".q.weight"):  # attention is unscaled: sharper would amplify rounding
                noise = model.config.d_kv**-0.5 * noise
            parameter.copy_(noise)
        model.lm_head.weight[model.config.eos_token_id] *= 1.5
        ids = torch.randint(3, model.config.vocab_size, (4, 9), generator=generator)
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
        model.decoder.final_layer_norm.weight *= 2.5 / logits.std()
    return model


def _eventful_decoder(model: Any, seed: int) -> PreTrainedModel:
    """As `build_stock`, of a model without an encoder."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                noise = 0.2 * noise + ("ln_" in key and "weight" in key)
            elif key.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
                noise = 0.1 * noise
            else:
                noise = 2 * parameter.shape[0] ** -0.5 * noise
            if "c_attn" in key and not model.config.scale_attn_weights:
                noise[..., : model.config.n_embd] *= 0.35
            parameter.copy_(noise)
        model.lm_head.weight[model.config.eos_token_id] *= 1.5
        ids = torch.randint(3, model.config.vocab_size, (4, 9), generator=generator)
        spread = 2.5 / model(input_ids=ids).logits.std()
        model.transformer.ln_f.weight *= spread
        model.transformer.ln_f.bias *= spread
    return model


def _eventful_bart(model: Any, variant: Variant) -> PreTrainedModel:
    """As `build_stock`, of BART: biases, those of the logits too, are not zero."""
    if not variant.tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(variant.seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                noise = 0.05 * noise + ("norm" in key and "weight" in key)
            elif "embed_positions" in key:
                noise = 0.3 * noise
            elif key.endswith(("shared.weight", "lm_head.weight")):
                noise = 0.1 * noise
            else:
                noise = 2 * parameter.shape[1] ** -0.5 * noise
            # Each row would repeat one token if its source or a constant said more than its past
            if key.endswith(("encoder_attn.out_proj.weight", "fc2.weight")):
                noise = 0.3 * noise
            elif key.endswith(("self_attn.q_proj.weight", "self_attn.out_proj.weight")):
                noise = 2 * noise
            parameter.copy_(noise)
        model.lm_head.weight[model.config.eos_token_id] *= 1.5
        ids = torch.randint(3, model.config.vocab_size, (4, 9), generator=generator)
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
        last = model.model.decoder.layers[-1].final_layer_norm
        for part in (last.weight, last.bias):
            part *= 2.5 / logits.std()
        model.final_logits_bias.normal_(0, 0.3, generator=generator)
    return model


@dataclass(frozen=True)
class Pair:
    """The same checkpoint as the stock class and as the Fast class, fp32 on the CPU."""

    stock: PreTrainedModel
    fast: PreTrainedModel


@functools.cache
def build_pair(name: str) -> Pair:
    """Both models of a variant, loaded from one saved checkpoint; built once per process."""
    with tempfile.TemporaryDirectory() as folder:
        build_stock(name).save_pretrained(Path(folder))
        stock = stock_class(name).from_pretrained(folder).eval()
        fast = fast_class(name).from_pretrained(folder).eval()
    return Pair(stock, fast)


def prompts(name: str, rows: int = 4, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Random prompts without pad or eos: int64 [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    variant = EVERY[name]
    vocabulary = ({**variant.tiny} | variant.changes)["vocab_size"]
    return torch.randint(3, vocabulary, (rows, length), generator=generator)
