"""Words in, phonemes out: what training, evaluation and the demo share."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, PreTrainedModel, T5ForConditionalGeneration

from examples.pronounce.data import decode_phonemes

CHECKPOINT = Path(__file__).parent / "checkpoint"


@cache
def tokenizer() -> ByT5Tokenizer:
    """The one tokenizer; making it takes longer than pronouncing a word."""
    return ByT5Tokenizer()


@cache
def special_tokens() -> frozenset[int]:
    """Ids of the start, end, padding and sentinel tokens."""
    return frozenset(tokenizer().all_special_ids)


def load(
    checkpoint: Path, *, fast: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The checkpoint in the stock class, or in fastgen's; in evaluation mode on the device."""
    if fast:
        from fastgen import FastT5ForConditionalGeneration as Model
    else:
        Model = T5ForConditionalGeneration
    return Model.from_pretrained(checkpoint, dtype=dtype).to(device).eval()


@torch.inference_mode()
def generate_tokens(
    model: PreTrainedModel, words: Sequence[str], *, batch_size: int = 1000
) -> list[list[int]]:
    """Greedy token ids for each word, without the start, end and padding tokens."""
    tokens: list[list[int]] = []
    for start in range(0, len(words), batch_size):
        batch = [word.lower() for word in words[start : start + batch_size]]
        inputs = tokenizer()(batch, padding=True, return_tensors="pt").to(model.device)
        rows = model.generate(**inputs, do_sample=False, num_beams=1).tolist()
        tokens += [[token for token in row if token not in special_tokens()] for row in rows]
    return tokens


def to_phonemes(tokens: Sequence[Sequence[int]]) -> list[str]:
    """Token ids of each word -> ARPAbet, e.g. "HH AH0 L OW1"."""
    return [decode_phonemes(tokenizer().decode(row)) for row in tokens]
