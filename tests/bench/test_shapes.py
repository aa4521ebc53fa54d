import pytest
import torch
import transformers

from fastgen.bench.shapes import SHAPES, Shape, kind_of, shape_config, write_random_checkpoint

# Parameters of the published checkpoints, from their model cards, in millions.
PUBLISHED_MILLIONS = {
    "t5-small": 60.5,
    "t5-base": 222.9,
    "t5-large": 737.7,
    "t5-3b": 2851.6,
    "t5-11b": 11307.3,
    "t5-v1_1-small": 77.0,
    "t5-v1_1-base": 247.6,
    "t5-v1_1-xxl": 11135.3,
    "t5-v1_1-xxl-encoder": 4762.3,
    "flan-t5-large": 783.2,
    "flan-t5-xl": 2849.8,
    "gpt2": 124.4,
    "gpt2-medium": 354.8,
    "gpt2-large": 774.0,
    "gpt2-xl": 1557.6,
    "bart-base": 139.4,
    "bart-large": 406.3,
    "bert-base": 109.5,
    "bert-large": 335.1,
}
GENERATING = ["t5-tiny", "t5-v1_1-tiny", "gpt2-tiny", "bart-tiny"]


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_shape_has_the_published_number_of_parameters(name):
    config, stock = shape_config(name), getattr(transformers, SHAPES[name].stock)
    with torch.device("meta"):
        model = stock(config)
    skipped = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    if config.tie_word_embeddings:
        skipped |= {"lm_head.weight", "model.encoder.embed_tokens.weight"}
        skipped.add("model.decoder.embed_tokens.weight")
    weights = model.named_parameters(remove_duplicate=False)
    count = sum(weight.numel() for weight_name, weight in weights if weight_name not in skipped)
    assert count / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], abs=0.1)


def test_unknown_shape_names_the_nearest():
    with pytest.raises(ValueError, match=r"'t5-smal'.*Did you mean t5-small@random"):
        shape_config("t5-smal")


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("t5-small@random", "seq2seq"),
        ("bart-large@random", "seq2seq"),
        ("gpt2-xl@random", "causal"),
        ("bert-base@random", "encoder"),
        ("t5-v1_1-xxl-encoder@random", "encoder"),
    ],
)
def test_kind_of_a_shape(model, kind):
    assert kind_of(model) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bart-tiny", "seq2seq"), ("gpt2-tiny", "causal"), ("t5-tiny-encoder", "encoder")],
)
def test_kind_of_a_folder_follows_from_what_was_saved(tmp_path, name, kind):
    write_random_checkpoint(name, tmp_path, dtype=torch.float32, device="cpu")
    assert kind_of(str(tmp_path)) == kind


def test_a_model_saved_without_a_head_generates_even_so(tmp_path):
    transformers.BartConfig(architectures=["BartModel"]).save_pretrained(tmp_path)
    assert kind_of(str(tmp_path)) == "seq2seq"


@pytest.mark.parametrize("name", GENERATING)
def test_random_checkpoint_has_varied_tokens_and_sane_logits(tmp_path, monkeypatch, name):
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    shape = Shape("T5ForConditionalGeneration", SHAPES["t5-tiny"].fields | gated)
    monkeypatch.setitem(SHAPES, "t5-v1_1-tiny", shape)
    write_random_checkpoint(name, tmp_path, dtype=torch.float32, device="cpu")
    model = getattr(transformers, SHAPES[name].stock).from_pretrained(tmp_path).eval()
    tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied is (name != "t5-v1_1-tiny")
    prompts = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompts)
    tokens = model.generate(
        input_ids=prompts, attention_mask=mask, max_new_tokens=16, eos_token_id=128
    )
    with torch.no_grad():
        read = {"input_ids": tokens}
        if SHAPES[name].kind == "seq2seq":
            read = {"input_ids": prompts, "decoder_input_ids": tokens}
        logits = model(**read).logits
    assert 1 < logits.std() < 9
    assert len(tokens[:, -15:].unique()) > 4
    if not name.startswith("t5"):
        assert all(len(row.unique()) > 4 for row in tokens[:, -15:])


@pytest.mark.parametrize("name", ["t5-tiny", "gpt2-tiny", "bart-tiny", "bert-tiny"])
def test_random_checkpoint_is_the_same_each_time(tmp_path, name):
    for folder in ("first", "second"):
        write_random_checkpoint(name, tmp_path / folder, dtype=torch.bfloat16, device="cpu")
    first, second = (tmp_path / f / "model.safetensors" for f in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
