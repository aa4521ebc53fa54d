"""A tiny T5 encoder and its tokenizer, as parts of other libraries' pipelines; all offline."""

from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel, T5ForSequenceClassification, T5Tokenizer

WORDS = ["a", "small", "red", "house", "on", "the", "hill"]
LETTERS = "abcdefghijklmnopqrstuvwxyz▁"
VOCABULARY = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), *LETTERS]
SENTENCES = ["a small red house", "on the hill", "the"]


def tokenizer() -> T5Tokenizer:
    """Whole words, else letters."""
    return T5Tokenizer(vocab=[(word, -float(i)) for i, word in enumerate(VOCABULARY)], extra_ids=0)


def config(**fields: Any) -> T5Config:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2}
    return T5Config(vocab_size=len(VOCABULARY), decoder_start_token_id=0, **sizes, **fields)


def encoder() -> T5EncoderModel:
    """The stock class with random weights, fp32 on the CPU."""
    torch.manual_seed(0)
    return T5EncoderModel(config()).eval()


def reranker() -> T5ForSequenceClassification:
    """One score a sequence, likewise."""
    torch.manual_seed(0)
    return T5ForSequenceClassification(config(num_labels=1)).eval()


def same_files(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files with the same contents."""
    contents = [{f.name: f.read_bytes() for f in folder.iterdir()} for folder in (first, second)]
    return contents[0] == contents[1]
