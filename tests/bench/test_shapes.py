import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from fastgen.bench.shapes import SHAPES, shape_config, write_random_checkpoint

# Parameters of the published checkpoints, from their model cards, in millions.
PUBLISHED_MILLIONS = {
    "t5-small": 60.5,
    "t5-base": 222.9,
    "t5-large": 737.7,
    "t5-3b": 2851.6,
    "t5-v1_1-small": 77.0,
    "t5-v1_1-base": 247.6,
    "flan-t5-large": 783.2,
    "flan-t5-xl": 2849.8,
}


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_shape_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(shape_config(name))
    tied = shape_config(name).tie_word_embeddings
    skipped = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    if tied:
        skipped.add("lm_head.weight")
    weights = model.named_parameters(remove_duplicate=False)
    count = sum(weight.numel() for weight_name, weight in weights if weight_name not in skipped)
    assert count / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], abs=0.1)


def test_unknown_shape_names_the_nearest():
    with pytest.raises(ValueError, match=r"'t5-smal'.*Did you mean t5-small@random"):
        shape_config("t5-smal")


@pytest.mark.parametrize("gated", [False, True])
def test_random_checkpoint_has_varied_tokens_and_sane_logits(tmp_path, monkeypatch, gated):
    if gated:
        fields = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        monkeypatch.setitem(SHAPES, "t5-tiny", SHAPES["t5-tiny"] | fields)
    write_random_checkpoint("t5-tiny", tmp_path, dtype=torch.float32, device="cpu")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    tied = model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr()
    assert tied is not gated
    prompts = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))
    tokens = model.generate(input_ids=prompts, max_new_tokens=16, eos_token_id=128)
    with torch.no_grad():
        logits = model(input_ids=prompts, decoder_input_ids=tokens).logits
    assert 1 < logits.std() < 9
    assert len(tokens[:, 1:].unique()) > 4


def test_random_checkpoint_is_the_same_each_time(tmp_path):
    for folder in ("first", "second"):
        write_random_checkpoint("t5-tiny", tmp_path / folder, dtype=torch.bfloat16, device="cpu")
    first, second = (tmp_path / f / "model.safetensors" for f in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
