"""A Fast encoder in a SentenceTransformer: same embeddings, and saved as the stock model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import T5EncoderModel, T5ForSequenceClassification

from fastgen import FastT5EncoderModel, FastT5ForSequenceClassification
from tests.ecosystem import tiny

library = pytest.importorskip(
    "sentence_transformers", reason="needs sentence-transformers, of the extra dev"
)


def sentence_t5(folder: Path) -> Any:
    """A model of the kind of sentence-t5, saved in ``folder``: mean pooling, unit length."""
    from sentence_transformers.sentence_transformer import modules

    tiny.encoder().save_pretrained(folder / "t5")
    tiny.tokenizer().save_pretrained(folder / "t5")
    transformer = modules.Transformer(str(folder / "t5"))
    pooling = modules.Pooling(tiny.encoder().config.d_model)
    parts = [transformer, pooling, modules.Normalize()]
    library.SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder / "st"))
    return library.SentenceTransformer(str(folder / "st"), device="cpu")


def test_embeddings_come_from_the_engine_and_the_model_is_saved_as_stock(tmp_path: Path) -> None:
    model = sentence_t5(tmp_path)
    assert type(model[0].model) is T5EncoderModel
    expected = model.encode(tiny.SENTENCES)

    fast = FastT5EncoderModel.from_pretrained(tmp_path / "st")
    model[0].model = fast
    np.testing.assert_allclose(model.encode(tiny.SENTENCES), expected, rtol=1e-4, atol=1e-5)
    assert fast.encoder._engine is not None, "torch served the model"

    model.save_pretrained(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert type(again[0].model) is T5EncoderModel
    np.testing.assert_array_equal(again.encode(tiny.SENTENCES), expected)


def test_scores_of_a_cross_encoder_come_from_the_engine(tmp_path: Path) -> None:
    tiny.reranker().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = library.CrossEncoder(str(tmp_path), device="cpu")
    assert type(model[0].model) is T5ForSequenceClassification
    pairs = [(tiny.SENTENCES[0], tiny.SENTENCES[1]), (tiny.SENTENCES[2], tiny.SENTENCES[0])]
    expected = model.predict(pairs)

    fast = FastT5ForSequenceClassification.from_pretrained(tmp_path)
    model[0].model = fast
    np.testing.assert_allclose(model.predict(pairs), expected, rtol=1e-4, atol=1e-5)
    stacks = fast.transformer.encoder, fast.transformer.decoder
    assert all(stack._engine is not None for stack in stacks), "torch served the model"

    model.save_pretrained(str(tmp_path / "saved"))
    again = library.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert type(again[0].model) is T5ForSequenceClassification
    np.testing.assert_array_equal(again.predict(pairs), expected)
