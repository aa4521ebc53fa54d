"""A Fast text encoder in a pipeline of diffusers: same images, and saved as the stock pipeline."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5EncoderModel

from fastgen import FastT5EncoderModel
from tests.ecosystem import tiny

diffusers = pytest.importorskip("diffusers", reason="needs diffusers, of the extra dev")


def pipeline(text_encoder: T5EncoderModel) -> Any:
    """PixArt with random weights, for images of 16 x 16."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    parts = text_encoder, vae, transformer, diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtAlphaPipeline(tiny.tokenizer(), *parts)


def image(pipe: Any) -> torch.Tensor:
    """[1, 3, 16, 16], the same for every call."""
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "max_sequence_length": 16, "num_inference_steps": 2}
    plain = {"use_resolution_binning": False, "clean_caption": False, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    return pipe(tiny.SENTENCES[0], generator=generator, **size, **plain).images


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as it is saved without fastgen."""
    folder = tmp_path_factory.mktemp("pipelines") / "stock"
    pipeline(tiny.encoder()).save_pretrained(folder)
    return folder


def load_fast(folder: Path) -> FastT5EncoderModel:
    return FastT5EncoderModel.from_pretrained(folder, subfolder="text_encoder")


def test_a_pipeline_runs_on_the_engine_and_loads_with_and_without_fastgen(
    stock_folder: Path, tmp_path: Path
) -> None:
    expected = image(diffusers.PixArtAlphaPipeline.from_pretrained(stock_folder))
    fast = load_fast(stock_folder)
    pipe = diffusers.PixArtAlphaPipeline.from_pretrained(stock_folder, text_encoder=fast)
    torch.testing.assert_close(image(pipe), expected)
    assert fast.encoder._engine is not None, "torch served the pipeline"

    pipe.save_pretrained(tmp_path)
    index, stock_index = (
        json.loads((folder / "model_index.json").read_text()) for folder in (tmp_path, stock_folder)
    )
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    assert {k: v for k, v in index.items() if k != "_name_or_path"} == stock_index
    assert tiny.same_files(tmp_path / "text_encoder", stock_folder / "text_encoder")

    again = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path)
    assert type(again.text_encoder) is T5EncoderModel
    again.text_encoder = load_fast(tmp_path)  # as a program does it, after loading
    assert again.config.text_encoder == ("transformers", "T5EncoderModel")
    torch.testing.assert_close(image(again), expected)


def test_a_saved_pipeline_loads_where_fastgen_is_not_installed(
    stock_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline(load_fast(stock_folder)).save_pretrained(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastgen"]:
        monkeypatch.setitem(sys.modules, name, None)
    again = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path)
    assert type(again.text_encoder) is T5EncoderModel
