"""Published T5 shapes with random weights: ``t5-small@random`` is a model without a download."""

import difflib
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from fastgen.bench.workload import SEED

SUFFIX = "@random"

_T5: dict[str, dict[str, Any]] = {
    "small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "3b": {"d_model": 1024, "d_ff": 16384, "num_layers": 24, "num_heads": 32, "d_kv": 128},
    # Not published: for tests.
    "tiny": {
        "d_model": 32,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "d_kv": 8,
        "vocab_size": 128,
    },
}
_T5_V1_1: dict[str, dict[str, Any]] = {
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

SHAPES: dict[str, dict[str, Any]] = {
    **{f"t5-{size}": fields for size, fields in _T5.items()},
    **{f"t5-v1_1-{size}": fields | _GATED for size, fields in _T5_V1_1.items()},
    **{f"flan-t5-{size}": fields | _GATED for size, fields in _T5_V1_1.items()},
}
"""Shape name -> the fields in which its published config differs from T5Config's defaults."""

# Stock initialisation makes a tied T5 repeat its last token for ever, which would hide errors in
# everything but the embedding. These two make the other layers decide, with logits that have the
# spread of a trained model's.
_TIED_EMBEDDING_STD = 0.02
_LOGIT_STD = 3.0


def shape_config(name: str) -> T5Config:
    """The published config of a shape.

    Args:
        name: a key of ``SHAPES``, without ``@random``.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f" Did you mean {near[0]}{SUFFIX}?" if near else ""
        raise ValueError(
            f"Unknown shape {name!r}.{hint} Known shapes: {', '.join(SHAPES)} "
            f"(each followed by {SUFFIX})."
        )
    fields = SHAPES[name]
    config = T5Config(decoder_start_token_id=0, **fields)
    # T5Config always ties; transformers unties when it loads a checkpoint whose lm_head differs.
    config.tie_word_embeddings = fields.get("tie_word_embeddings", True)
    return config


def write_random_checkpoint(
    name: str, folder: Path, *, dtype: torch.dtype, device: str, seed: int = SEED
) -> None:
    """Write a checkpoint of a shape with random weights, loadable like a downloaded one.

    The weights are drawn in fp32 on ``device`` (seconds for billions of them on a GPU), scaled so
    that logits have a standard deviation near 3, and stored in ``dtype``.

    Raises:
        ValueError: an unknown shape.
    """
    config = shape_config(name)
    torch.manual_seed(seed)
    with torch.device(device):
        model = T5ForConditionalGeneration(config)
    # A logit is norm_weight * (unit-variance hidden state . output embedding) * output_scale.
    output_std = _TIED_EMBEDDING_STD if config.tie_word_embeddings else 1.0
    output_scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
    spread = output_std * output_scale * config.d_model**0.5
    with torch.no_grad():
        if config.tie_word_embeddings:
            model.shared.weight.mul_(_TIED_EMBEDDING_STD)
        model.decoder.final_layer_norm.weight.fill_(_LOGIT_STD / spread)
    model.to(dtype).save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
