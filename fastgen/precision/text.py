"""Lines of text as batches of a model's inputs."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from fastgen.precision.passes import Batch

_ROWS, _TOKENS = 8, 512


def batches(checkpoint: str, model: Any, lines: Sequence[str]) -> list[Batch]:
    """Token ids and masks of the lines that are not empty, by the checkpoint's own tokenizer.

    Raises:
        OSError, ValueError: transformers' errors where there is none.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if not model.config.is_encoder_decoder and hasattr(model, "generate"):
        tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    known = getattr(model.config, "max_position_embeddings", None) or _TOKENS
    said = [line for line in lines if line.strip()]
    return [
        dict(
            tokenizer(
                said[start : start + _ROWS],
                padding=True,
                truncation=True,
                max_length=min(known, _TOKENS),
                return_tensors="pt",
            )
        )
        for start in range(0, len(said), _ROWS)
    ]
