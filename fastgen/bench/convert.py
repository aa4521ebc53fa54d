"""A Hugging Face T5 checkpoint as a CTranslate2 model whose tokens are the ids in decimal."""

from pathlib import Path
from typing import Any

import torch
from ctranslate2.converters import transformers as loaders
from ctranslate2.converters.converter import Converter
from transformers import AutoModelForSeq2SeqLM


def convert(checkpoint: str, folder: Path, dtype: torch.dtype) -> None:
    """Convert ``checkpoint`` (hub id or folder) to ``folder``, weights stored in ``dtype``.

    Needs no tokenizer, and reads and writes ids, so that outputs compare with Hugging Face's.

    Raises:
        ValueError: CTranslate2 has no conversion for this kind of model.
    """
    quantization = str(dtype).removeprefix("torch.")
    _IdConverter(checkpoint, dtype).convert(str(folder), quantization=quantization)


class _IdConverter(Converter):
    def __init__(self, checkpoint: str, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype

    def _load(self) -> Any:
        model = AutoModelForSeq2SeqLM.from_pretrained(self.checkpoint, dtype=self.dtype)
        kind = type(model.config).__name__
        loader = loaders._MODEL_LOADERS.get(kind)
        if loader is None:
            raise ValueError(f"CTranslate2 has no conversion for {kind}.")
        # The loader takes tying for output scaling; since transformers 5 they are two fields.
        model.config.tie_word_embeddings = model.config.scale_decoder_outputs
        with torch.no_grad():
            return loader(model, _IdTokenizer(model.config))


class _IdTokenizer:
    """The part of a tokenizer that CTranslate2's loaders use; token ``"17"`` is id 17."""

    def __init__(self, config: Any) -> None:
        self.vocab_size = config.vocab_size
        self.pad_token = str(config.pad_token_id)
        self.eos_token = str(config.eos_token_id)
        self.unk_token = "2"

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.vocab_size)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)
