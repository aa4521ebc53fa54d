"""Loading, saving and starting again: checkpoints of any layout, the engine cache, odd configs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

from fastgen import EngineOptions, FastT5, FastT5EncoderModel
from fastgen.engine_cache import EngineCache
from fastgen.errors import OptionError
from tests.configs import TINY, VARIANTS, Pair, build_stock, fast_class
from tests.helpers import (
    CAUSAL,
    assert_left_to_torch,
    assert_served,
    copies,
    logits,
    refusal,
    sources,
    targets,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A saved stock model."""
    folder = tmp_path / "checkpoint"
    build_stock("t5-1.1").save_pretrained(folder)
    return folder


def pair(checkpoint: Path, **arguments: Any) -> Pair:
    """Both classes loaded with the same arguments."""
    stock = T5ForConditionalGeneration.from_pretrained(checkpoint, **arguments)
    return Pair(stock, FastT5.from_pretrained(checkpoint, **arguments))


# Saving


@pytest.mark.parametrize("name", CAUSAL)
def test_stock_transformers_loads_what_was_saved(name: str, tmp_path: Path) -> None:
    found = copies(name)
    found.fast.save_pretrained(tmp_path)
    stock = VARIANTS[name].stock
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [stock]
    loaded = getattr(transformers, stock).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(found.stock))
    assert type(transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) is type(loaded)
    assert type(found.fast) is fast_class(name)
    assert_served(found)


def test_a_saved_checkpoint_does_not_depend_on_the_class_that_saved_it(tmp_path: Path) -> None:
    found = copies()
    for name, model in (("stock", found.stock), ("fast", found.fast)):
        model.save_pretrained(tmp_path / name)
    files = [sorted((tmp_path / name).iterdir()) for name in ("stock", "fast")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    for expected, written in zip(*files, strict=True):
        assert written.read_bytes() == expected.read_bytes(), written.name


def test_an_encoder_model_saves_its_stock_class(tmp_path: Path) -> None:
    FastT5EncoderModel(T5Config(**TINY)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["T5EncoderModel"]


# Loading


def test_a_folder_without_revision(checkpoint: Path) -> None:
    assert_served(pair(checkpoint))
    assert_served(pair(checkpoint, local_files_only=True, use_safetensors=True))


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    copies().fast.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_served(pair(tmp_path))


def test_dtype(checkpoint: Path) -> None:
    found = pair(checkpoint, dtype=torch.float64)
    assert found.fast.dtype == torch.float64
    assert_left_to_torch(found, "float64")
    assert_served(pair(checkpoint, dtype="auto"))


def test_device_map(checkpoint: Path) -> None:
    pytest.importorskip("accelerate")
    assert_served(pair(checkpoint, device_map="cpu"))
    assert_served(pair(checkpoint, device_map={"": "cpu"}))


def test_changed_config_fields(checkpoint: Path) -> None:
    found = pair(checkpoint, layer_norm_epsilon=0.5)
    assert found.fast.config.layer_norm_epsilon == 0.5
    assert_served(found)


def test_output_loading_info(checkpoint: Path) -> None:
    options = {"min_bucket": 4}
    found = FastT5.from_pretrained(checkpoint, output_loading_info=True, engine_options=options)
    model, info = found
    assert model.engine_options.min_bucket == 4
    assert not info["missing_keys"]


def test_a_subclass_loads_and_saves_as_the_stock_class(checkpoint: Path, tmp_path: Path) -> None:
    class Mine(FastT5):
        """A user's own subclass."""

    model = Mine.from_pretrained(checkpoint)
    assert refusal(model) is None
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["T5ForConditionalGeneration"]


@pytest.mark.parametrize(
    "options", [{"min_bucket": 16}, EngineOptions(min_bucket=16)], ids=["dict", "dataclass"]
)
def test_engine_options(options: Any, checkpoint: Path) -> None:
    model = FastT5.from_pretrained(checkpoint, engine_options=options)
    assert model.engine_options == model.encoder.engine_options == EngineOptions(min_bucket=16)


def test_wrong_engine_options_are_refused_before_loading() -> None:
    with pytest.raises(OptionError, match="Did you mean 'min_bucket'"):
        FastT5.from_pretrained("no such folder", engine_options={"min_buckets": 16})


def test_engine_options_of_the_environment(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGEN_ENGINE_OPTIONS", "backend=torch")
    assert "backend='torch'" in str(refusal(FastT5.from_pretrained(checkpoint)))
    assert "backend='torch'" in str(refusal(FastT5(T5Config(**TINY)).eval()))


def test_random_weights_from_a_config() -> None:
    torch.manual_seed(0)
    stock = T5ForConditionalGeneration(T5Config(**TINY)).eval()
    torch.manual_seed(0)
    assert_served(Pair(stock, FastT5(T5Config(**TINY)).eval()))


# The engine cache


def test_compiling_stores_every_engine(engine_cache_folder: Path) -> None:
    model = copies().fast
    model.compile_engine()
    titles = " ".join(entry.title for entry in EngineCache().entries())
    for graph in ("encoder", "cross", "decoder-masked"):
        assert f" {graph} (onnxruntime, cpu, float32)" in titles


def test_the_engine_cache_may_be_switched_off(engine_cache_folder: Path, tmp_path: Path) -> None:
    found = copies()
    for path in engine_cache_folder.iterdir():
        path.unlink()
    found.fast.engine_options = {"disk_cache": False}
    assert_served(found)
    assert not list(engine_cache_folder.iterdir())
    found.fast.engine_options = {"cache_dir": tmp_path / "elsewhere"}
    assert_served(found)
    assert EngineCache(tmp_path / "elsewhere").entries()


def test_the_constructor_takes_engine_options() -> None:
    config = build_stock("t5-1.1").config
    assert FastT5(config, engine_options={"min_bucket": 8}).engine_options.min_bucket == 8
    model = FastT5EncoderModel._from_config(config, engine_options=EngineOptions(backend="torch"))
    assert model.encoder.engine_options.backend == "torch"
    assert FastT5(config).engine_options == EngineOptions()
    with pytest.raises(OptionError, match="Did you mean 'prepack'"):
        FastT5(config, engine_options={"prepak": 1})


_SECOND_PROCESS = """
import sys, torch
from fastgen import FastT5
from fastgen.graphs import graph

def build(*arguments, **named):
    raise AssertionError("a graph was built")
graph.build = build
model = FastT5.from_pretrained(sys.argv[1])
ids = torch.arange(3, 12)[None]
assert model.explain(input_ids=ids).path != "torch"
print(model.generate(ids, max_new_tokens=6, num_beams=2).tolist())
print(model.generate(ids, max_new_tokens=6).tolist())
"""


def test_a_second_process_compiles_nothing(
    checkpoint: Path, engine_cache_folder: Path, tmp_path: Path
) -> None:
    model = FastT5.from_pretrained(checkpoint)
    model.compile_engine()
    ids = torch.arange(3, 12)[None]
    expected = [model.generate(ids, max_new_tokens=6, num_beams=n).tolist() for n in (2, 1)]
    moved = checkpoint.rename(tmp_path / "moved")  # entries are found by content, not by a folder
    done = subprocess.run(
        [sys.executable, "-c", _SECOND_PROCESS, moved], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tokens) for tokens in expected]


# Configs that the engine does not know


def odd_pair(**fields: Any) -> Pair:
    """Both models of a config, with weights that make every part count."""
    config = T5Config(**TINY | fields)
    torch.manual_seed(0)
    stock = T5ForConditionalGeneration(config).eval()
    for name, parameter in stock.named_parameters():
        if "layer_norm" not in name:
            parameter.data.normal_(std=0.3)
    fast = FastT5(T5Config(**TINY | fields)).eval()
    fast.load_state_dict(stock.state_dict())
    return Pair(stock, fast)


@pytest.mark.parametrize("activation", ["gated-mish", "quick_gelu", "gated-gelu_fast"])
def test_torch_serves_an_unknown_activation(activation: str) -> None:
    name = activation.removeprefix("gated-")
    assert_left_to_torch(odd_pair(feed_forward_proj=activation), f"dense_act_fn={name!r}")


@pytest.mark.parametrize(
    "activation", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish", "tanh"]
)
@pytest.mark.parametrize("gate", ["", "gated-"])
def test_the_engine_knows_an_activation(activation: str, gate: str) -> None:
    assert_served(odd_pair(feed_forward_proj=gate + activation))


@pytest.mark.parametrize(
    ("buckets", "distance"),
    [(4, 3), (4, 128), (5, 8), (7, 4), (7, 20), (8, 8), (32, 17), (32, 128), (33, 20), (2, 1)],
)
def test_odd_relative_positions(buckets: int, distance: int) -> None:
    """Far beyond the maximum distance, by the engine or by torch: as stock, or its error."""
    found = odd_pair(
        relative_attention_num_buckets=buckets, relative_attention_max_distance=distance
    )
    generator = torch.Generator().manual_seed(0)
    call = {
        "input_ids": torch.randint(3, 96, (2, 70), generator=generator),
        "decoder_input_ids": torch.randint(3, 96, (2, 60), generator=generator),
    }
    try:
        expected = logits(found.stock, **call)
    except ZeroDivisionError:
        assert "relative_attention_num_buckets=2" in str(refusal(found.fast, **call))
        with pytest.raises(ZeroDivisionError):
            logits(found.fast, **call)
    else:
        torch.testing.assert_close(logits(found.fast, **call), expected, rtol=1e-3, atol=1e-3)


def test_a_config_whose_far_positions_have_no_bucket_is_left_to_torch() -> None:
    """The stock model fails on long inputs only."""
    found = odd_pair(relative_attention_num_buckets=32, relative_attention_max_distance=4)
    ids, prompt = sources()[:, :3], targets()[:, :3]
    reason = str(refusal(found.fast, input_ids=ids, decoder_input_ids=prompt))
    assert "relative_attention_max_distance=4" in reason
    call = {"input_ids": ids, "decoder_input_ids": prompt}
    torch.testing.assert_close(logits(found.fast, **call), logits(found.stock, **call))


@pytest.mark.parametrize("fields", [{"num_decoder_layers": 0}, {"layer_norm_epsilon": 0.0}])
def test_extreme_configs(fields: dict[str, Any]) -> None:
    assert_served(odd_pair(**fields))
