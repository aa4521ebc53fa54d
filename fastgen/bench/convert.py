"""A Hugging Face checkpoint as a CTranslate2 model whose tokens are the ids in decimal."""

from pathlib import Path
from typing import Any

import torch
import transformers
from ctranslate2.converters import transformers as loaders
from ctranslate2.converters.converter import Converter

from fastgen.bench.shapes import kind_of_class

_AUTO = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal": "AutoModelForCausalLM",
    "encoder": "AutoModel",
}
# What the loaders read and transformers 5 has dropped from its configs.
_DROPPED: dict[str, dict[str, Any]] = {
    "bart": {
        "normalize_before": False,
        "add_final_layer_norm": False,
        "normalize_embedding": True,
    },
    "bert": {"position_embedding_type": "absolute"},
}


def convert(checkpoint: str, folder: Path, dtype: torch.dtype, kind: str) -> None:
    """Convert ``checkpoint`` (hub id or folder) to ``folder``, weights stored in ``dtype``.

    Needs no tokenizer, and reads and writes ids, so that outputs compare with Hugging Face's.

    Args:
        kind: ``seq2seq``, ``causal`` or ``encoder``.

    Raises:
        ValueError: CTranslate2 has no conversion for this kind of model.
    """
    quantization = str(dtype).removeprefix("torch.")
    _IdConverter(checkpoint, dtype, kind).convert(str(folder), quantization=quantization)


class _IdConverter(Converter):
    def __init__(self, checkpoint: str, dtype: torch.dtype, kind: str) -> None:
        self.checkpoint, self.dtype, self.kind = checkpoint, dtype, kind

    def _load(self) -> Any:
        config = transformers.AutoConfig.from_pretrained(self.checkpoint)
        name = type(config).__name__
        loader = loaders._MODEL_LOADERS.get(name)
        if loader is None:
            raise ValueError(f"CTranslate2 has no conversion for {name}.")
        if (known := kind_of_class(loader.architecture_name)) != self.kind:
            raise ValueError(f"CTranslate2 converts {name} as {known}, not as {self.kind}.")
        auto = getattr(transformers, _AUTO[self.kind])
        model = auto.from_pretrained(self.checkpoint, dtype=self.dtype)
        for field, value in _DROPPED.get(model.config.model_type, {}).items():
            setattr(model.config, field, value)
        if hasattr(model.config, "scale_decoder_outputs"):
            # The loader takes tying for output scaling; since transformers 5 they are two fields.
            model.config.tie_word_embeddings = model.config.scale_decoder_outputs
        with torch.no_grad():
            return loader(model, _IdTokenizer(model.config))


class _IdTokenizer:
    """The part of a tokenizer that CTranslate2's loaders use; token ``"17"`` is id 17."""

    def __init__(self, config: Any) -> None:
        self.vocab_size = config.vocab_size
        self.bos_token = str(getattr(config, "bos_token_id", None))
        self.pad_token = str(config.pad_token_id)
        self.eos_token = str(config.eos_token_id)
        self.unk_token = "2"

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.vocab_size)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)
