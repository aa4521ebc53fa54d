"""Published shapes with random weights: ``t5-small@random`` is a model without a download."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from fastgen.bench.workload import SEED

SUFFIX = "@random"


@dataclass(frozen=True)
class Shape:
    """A published config: whose it is, and how it differs from the config class's defaults."""

    stock: str
    """Name of the stock class that its checkpoint is one of."""
    fields: dict[str, Any]

    @property
    def kind(self) -> str:
        """``seq2seq``, ``causal`` or ``encoder``."""
        return kind_of_class(self.stock)


def kind_of_class(stock: str) -> str:
    """What a stock class is asked to do, by its name: generate from a source (``seq2seq``), go on
    with a prompt (``causal``), or give hidden states (``encoder``)."""
    if stock.endswith("ForConditionalGeneration"):
        return "seq2seq"
    return "causal" if stock.endswith(("LMHeadModel", "ForCausalLM")) else "encoder"


_T5: dict[str, dict[str, Any]] = {
    "small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "3b": {"d_model": 1024, "d_ff": 16384, "num_layers": 24, "num_heads": 32, "d_kv": 128},
    "11b": {"d_model": 1024, "d_ff": 65536, "num_layers": 24, "num_heads": 128, "d_kv": 128},
}
_T5_V1_1: dict[str, dict[str, Any]] = {
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "xxl": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_GPT2: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}


def _bart(width: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    both = {"layers": layers, "attention_heads": heads, "ffn_dim": inner}
    sides = {f"{side}_{name}": both[name] for side in ("encoder", "decoder") for name in both}
    # Published ones force the end token; a call that is measured generates all tokens.
    return {"d_model": width, "forced_eos_token_id": None, **sides, **more}


_BART = {"bart-base": _bart(768, 6, 12, 3072), "bart-large": _bart(1024, 12, 16, 4096)}
_BERT: dict[str, dict[str, Any]] = {
    "bert-base": {},
    "bert-large": {
        **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        "intermediate_size": 4096,
    },
}
# Not published: for tests.
_TINY_T5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
_TINY_T5 |= {"vocab_size": 128}
_TINY_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 128}
_TINY_GPT2 |= {"bos_token_id": 0, "eos_token_id": 1}
_TINY_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_BERT |= {"intermediate_size": 64, "max_position_embeddings": 128, "vocab_size": 128}


def _table(stock: str, shapes: dict[str, dict[str, Any]], **more: Any) -> dict[str, Shape]:
    return {name: Shape(stock, fields | more) for name, fields in shapes.items()}


def _named(prefix: str, sizes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{prefix}-{size}": fields for size, fields in sizes.items()}


SHAPES: dict[str, Shape] = {
    **_table("T5ForConditionalGeneration", _named("t5", _T5)),
    **_table("T5ForConditionalGeneration", _named("t5-v1_1", _T5_V1_1), **_GATED),
    **_table("T5ForConditionalGeneration", _named("flan-t5", _T5_V1_1), **_GATED),
    "t5-v1_1-xxl-encoder": Shape("T5EncoderModel", _T5_V1_1["xxl"] | _GATED),
    **_table("GPT2LMHeadModel", _GPT2),
    **_table("BartForConditionalGeneration", _BART),
    **_table("BertModel", _BERT),
    "t5-tiny": Shape("T5ForConditionalGeneration", _TINY_T5),
    "t5-tiny-encoder": Shape("T5EncoderModel", _TINY_T5),
    "gpt2-tiny": Shape("GPT2LMHeadModel", _TINY_GPT2),
    "bart-tiny": Shape(
        "BartForConditionalGeneration",
        _bart(32, 2, 4, 64, vocab_size=128, max_position_embeddings=128),
    ),
    "bert-tiny": Shape("BertModel", _TINY_BERT),
}
"""By name, without ``@random``."""


def shape_config(name: str) -> Any:
    """The published config of a shape.

    Args:
        name: a key of ``SHAPES``, without ``@random``.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    shape = shape_of(name)
    config_class = getattr(transformers, shape.stock).config_class
    if not shape.stock.startswith("T5"):
        return config_class(**shape.fields)
    config = config_class(decoder_start_token_id=0, **shape.fields)
    # T5Config always ties; transformers unties when it loads a checkpoint whose lm_head differs.
    config.tie_word_embeddings = shape.fields.get("tie_word_embeddings", True)
    return config


def shape_of(name: str) -> Shape:
    """The shape of this name, without ``@random``.

    Raises:
        ValueError: as ``shape_config``.
    """
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f" Did you mean {near[0]}{SUFFIX}?" if near else ""
        raise ValueError(
            f"Unknown shape {name!r}.{hint} Known shapes: {', '.join(SHAPES)} "
            f"(each followed by {SUFFIX})."
        )
    return SHAPES[name]


def kind_of(model: str) -> str:
    """``seq2seq``, ``causal`` or ``encoder``, of a hub id, a folder or ``NAME@random``.

    Raises:
        ValueError: an unknown shape.
        OSError: no such model.
    """
    if model.endswith(SUFFIX):
        return shape_of(model.removesuffix(SUFFIX)).kind
    config = transformers.AutoConfig.from_pretrained(model)
    saved = (config.architectures or [""])[0]
    if config.is_encoder_decoder and not saved.endswith("EncoderModel"):
        return "seq2seq"  # saved without a head, perhaps, as bart-base was
    return kind_of_class(saved)


def write_random_checkpoint(
    name: str, folder: Path, *, dtype: torch.dtype, device: str, seed: int = SEED
) -> None:
    """Write a checkpoint of a shape with random weights, loadable like a downloaded one.

    The weights are drawn in fp32 on ``device`` (seconds for billions of them on a GPU) and stored
    in ``dtype``. Logits of what generates have a standard deviation near 3.

    Raises:
        ValueError: an unknown shape.
    """
    config = shape_config(name)
    stock = SHAPES[name].stock
    torch.manual_seed(seed)
    with torch.device(device):
        model = getattr(transformers, stock)(config)
    if stock in _LIVELY:
        with torch.no_grad():
            _LIVELY[stock](model)
    model.to(dtype).save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


# Stock initialisation makes a tied model repeat its last token for ever, which would hide errors in
# everything but the embedding; and deep models whose every output is nearly the same, whatever they
# read. These make all layers decide, with logits that have the spread of a trained model's: a logit
# is norm_weight * (unit-variance hidden state . output row). The factors were tried: tokens vary,
# and bfloat16 moves a logit by a tenth of their spread at most.
_TIED_EMBEDDING_STD = 0.02
_LOGIT_STD = 3.0
_POSITIONS = 2.0


def _lively_t5(model: Any) -> None:
    config = model.config
    if config.tie_word_embeddings:
        model.shared.weight.mul_(_TIED_EMBEDDING_STD)
    output_std = _TIED_EMBEDDING_STD if config.tie_word_embeddings else 1.0
    output_scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
    _scale_to(model.decoder.final_layer_norm, output_std * output_scale * config.d_model**0.5)


def _lively_gpt2(model: Any) -> None:
    width = model.config.n_embd
    for block in model.transformer.h:
        _draw(block.attn.c_attn.weight, width)
        block.attn.c_attn.weight[:, : 2 * width].mul_(2.0)  # queries and keys: choose few slots
        for product in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            _draw(product.weight, product.weight.shape[0])
    model.transformer.wpe.weight.mul_(_POSITIONS)
    _scale_to(model.transformer.ln_f, model.config.initializer_range * width**0.5)


def _lively_bart(model: Any) -> None:
    # Norms after sublayers: at the stock size what a sublayer adds is small, and the token stays
    for side in (model.model.encoder, model.model.decoder):
        for name, product in side.layers.named_modules():
            if isinstance(product, torch.nn.Linear):
                sharp = name.endswith(("q_proj", "k_proj"))  # attention chooses few tokens,
                alike = name.endswith("out_proj")  # and yet gives all tokens much the same
                _draw(product.weight, product.in_features, 1.5 if sharp else 0.3 if alike else 1.0)
            if name.endswith("fc2"):  # what an activation gives on average is the same for all
                product.weight.sub_(product.weight.mean(dim=1, keepdim=True))
        side.embed_positions.weight.mul_(_POSITIONS)
    config = model.config
    last = model.model.decoder.layers[-1].final_layer_norm
    _scale_to(last, config.init_std * config.d_model**0.5)


_LIVELY: dict[str, Callable[[Any], None]] = {
    "T5ForConditionalGeneration": _lively_t5,
    "GPT2LMHeadModel": _lively_gpt2,
    "BartForConditionalGeneration": _lively_bart,
}


def _draw(weight: torch.Tensor, inputs: int, gain: float = 1.0) -> None:
    """Weights whose product with unit-variance inputs has the standard deviation ``gain``."""
    weight.normal_(std=gain * inputs**-0.5)


def _scale_to(norm: Any, spread: float) -> None:
    """Let the last norm give logits of the wanted spread, which is ``spread`` at a weight of 1."""
    norm.weight.fill_(_LOGIT_STD / spread)
