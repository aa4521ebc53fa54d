"""FastAutoModelForSeq2SeqLM: model_type -> Fast class."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, MBartConfig, MBartForConditionalGeneration

import fastgen
from fastgen import FastAutoModelForSeq2SeqLM
from fastgen.errors import FallbackWarning, OptionError, UnsupportedConfigError
from tests.configs import build_stock, fast_class, prompts

NAMES = ("t5-1.0", "mt5", "umt5", "bart")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_becomes_its_fast_class(name: str, tmp_path: Path) -> None:
    stock = build_stock(name)
    stock.save_pretrained(tmp_path)
    model = FastAutoModelForSeq2SeqLM.from_pretrained(tmp_path, engine_options={"min_bucket": 8})
    assert type(model) is fast_class(name)
    assert model.engine_options.min_bucket == 8
    ids = prompts(name)
    assert torch.equal(model.generate(ids, max_new_tokens=4), stock.generate(ids, max_new_tokens=4))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_becomes_its_fast_class(name: str) -> None:
    config = build_stock(name).config
    assert type(FastAutoModelForSeq2SeqLM.from_config(config)) is fast_class(name)


def test_arguments_are_those_of_the_stock_auto_class(tmp_path: Path) -> None:
    build_stock("t5-1.0").save_pretrained(tmp_path)
    model = FastAutoModelForSeq2SeqLM.from_pretrained(
        str(tmp_path), dropout_rate=0.3, dtype=torch.bfloat16, local_files_only=True
    )
    assert model.config.dropout_rate == 0.3  # a change of a config field
    assert model.dtype == torch.bfloat16
    config = AutoConfig.from_pretrained(tmp_path, dropout_rate=0.4)
    model, info = FastAutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert model.config.dropout_rate == 0.4
    assert not info["missing_keys"]


def test_a_model_without_fast_class_is_refused(tmp_path: Path) -> None:
    MBartConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedConfigError, match=r"model_type='mbart'.*t5, mt5, umt5"):
        FastAutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedConfigError, match="fallback=True"):
        FastAutoModelForSeq2SeqLM.from_config(MBartConfig())


TINY_MBART = MBartConfig(
    vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
    decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
)  # fmt: skip


def test_the_stock_class_is_the_fallback_that_is_asked_for(tmp_path: Path) -> None:
    stock = MBartForConditionalGeneration(TINY_MBART)
    stock.save_pretrained(tmp_path)
    arguments = {"fallback": True, "engine_options": {"min_bucket": 8}, "dtype": torch.bfloat16}
    with pytest.warns(FallbackWarning, match=r"'mbart'.*stock MBartForCond") as warned:
        model = FastAutoModelForSeq2SeqLM.from_pretrained(tmp_path, dropout=0.3, **arguments)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert type(model) is MBartForConditionalGeneration
    assert model.dtype == torch.bfloat16 and model.config.dropout == 0.3
    assert torch.equal(model.model.shared.weight, stock.model.shared.weight.to(torch.bfloat16))

    with pytest.warns(FallbackWarning):
        model, info = FastAutoModelForSeq2SeqLM.from_pretrained(
            tmp_path, config=stock.config, fallback=True, output_loading_info=True
        )
    assert type(model) is MBartForConditionalGeneration and not info["missing_keys"]
    with pytest.warns(FallbackWarning) as warned:
        model = FastAutoModelForSeq2SeqLM.from_config(
            TINY_MBART, trust_remote_code=False, **arguments
        )
    assert type(model) is MBartForConditionalGeneration and model.dtype == torch.bfloat16
    assert warned[0].filename == __file__
    with pytest.raises(OptionError, match="min_bucket"):
        FastAutoModelForSeq2SeqLM.from_config(
            TINY_MBART, fallback=True, engine_options={"min_buckets": 8}
        )


def test_a_fallback_is_not_taken_where_there_is_a_fast_class(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    stock = build_stock("t5-1.0")
    stock.save_pretrained(tmp_path)
    for model in (
        FastAutoModelForSeq2SeqLM.from_pretrained(tmp_path, fallback=True, trust_remote_code=True),
        FastAutoModelForSeq2SeqLM.from_config(stock.config, fallback=True),
    ):
        assert type(model) is fast_class("t5-1.0")
    assert not [w for w in recwarn if issubclass(w.category, FallbackWarning)]


def test_the_auto_class_itself_has_no_instances() -> None:
    for auto in (FastAutoModelForSeq2SeqLM, fastgen.FastAutoModelForCausalLM):
        with pytest.raises(OSError, match=rf"{auto.__name__}\.from_pretrained"):
            auto()


def test_a_model_without_an_encoder_has_an_auto_class_of_its_own(tmp_path: Path) -> None:
    build_stock("gpt2").save_pretrained(tmp_path)
    auto: Any = fastgen.FastAutoModelForCausalLM
    model = auto.from_pretrained(tmp_path, engine_options={"min_bucket": 8})
    assert type(model) is fast_class("gpt2") and model.engine_options.min_bucket == 8
    assert type(auto.from_config(model.config)) is fast_class("gpt2")
    with pytest.raises(UnsupportedConfigError, match="model_type='gpt2'"):
        FastAutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedConfigError, match="AutoModelForCausalLM of transformers"):
        auto.from_config(TINY_MBART)


def test_every_fast_class_for_generation_is_found_by_its_model_type() -> None:
    public = {n for n in fastgen.__all__ if n.endswith("ForConditionalGeneration")}
    assert {fast_class(name).__qualname__ for name in NAMES} == public


def test_names_of_arguments_are_those_of_the_stock_auto_class(tmp_path: Path) -> None:
    build_stock("t5-1.0").save_pretrained(tmp_path)
    model = FastAutoModelForSeq2SeqLM.from_pretrained(
        pretrained_model_name_or_path=tmp_path, config=str(tmp_path), code_revision="main"
    )
    assert type(model) is fast_class("t5-1.0")
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model = FastAutoModelForSeq2SeqLM.from_config(model.config, **options)
    assert type(model) is fast_class("t5-1.0")
    assert model.dtype == torch.bfloat16


TASKS = {
    "Model": ("t5", "mt5", "umt5", "bert", "bart"),
    "ForSequenceClassification": ("t5", "mt5", "umt5", "bert", "bart"),
    "ForTokenClassification": ("t5", "mt5", "umt5", "bert"),
    "ForQuestionAnswering": ("t5", "mt5", "umt5", "bert", "bart"),
    "ForMaskedLM": ("bert",),
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_its_auto_class(task: str) -> None:
    """It makes the Fast class of what transformers' auto class makes."""
    name = f"AutoModel{task.removeprefix('Model')}"
    stock, fast = getattr(transformers, name), getattr(fastgen, f"Fast{name}")
    for kind in TASKS[task]:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = AutoConfig.for_model(kind, vocab_size=40, **sizes, num_labels=2)
        with torch.device("meta"):
            expected = stock.from_config(config)
            found = fast.from_config(config)
        assert isinstance(found, type(expected))
        assert type(found).__qualname__ == f"Fast{type(expected).__name__}"
    with pytest.raises(UnsupportedConfigError, match=rf"'mbart'.*bert.*{name} of transformers"):
        fast.from_config(TINY_MBART)
