import os

import pytest
import torch

from fastgen.bench import encoders, generators
from fastgen.bench.contender import ctranslate2
from fastgen.bench.contenders import contenders
from fastgen.bench.encoders import HuggingFaceEncoder
from fastgen.bench.generators import HuggingFace
from fastgen.bench.openvino import PYTHON
from fastgen.bench.shapes import SHAPES, Shape, write_random_checkpoint
from fastgen.bench.workload import Encoding, Workload

WORKLOADS = [Workload(batch=2, new_tokens=6), Workload(batch=2, new_tokens=6, beams=3)]
SAMPLING = Workload(batch=2, new_tokens=6, sample=True)
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
EXACT = [name for name in generators.CONTENDERS if name != "openvino-int8"]
KINDS = {"t5": "seq2seq", "t5-v1_1": "seq2seq", "gpt2": "causal", "bart": "seq2seq"}


def skip_absent(name):
    if name == "ctranslate2":
        pytest.importorskip("ctranslate2")
    if name == "openvino" and PYTHON not in os.environ:
        pytest.skip(f"{PYTHON} is not set")


def outcome(contender_class, kind, checkpoint, folder, workload):
    contender = contender_class(kind, "cpu", torch.float32, 128)
    contender.load(contender.prepare(str(checkpoint), folder))
    output = contender.call(contender.inputs(workload), workload)
    return contender.result(output)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        fields = SHAPES["t5-tiny"].fields | GATED
        patch.setitem(SHAPES, "t5-v1_1-tiny", Shape("T5ForConditionalGeneration", fields))
        for name in (*KINDS, "bert"):
            made[name] = tmp_path_factory.mktemp(name)
            write_random_checkpoint(f"{name}-tiny", made[name], dtype=torch.float32, device="cpu")
    return made


@pytest.mark.parametrize("workload", [*WORKLOADS, SAMPLING], ids=lambda workload: workload.title)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("family", KINDS)
def test_contender_generates_the_stock_tokens(family, name, workload, checkpoints, tmp_path):
    contender, kind = generators.CONTENDERS[name], KINDS[family]
    skip_absent(name)
    tokens = outcome(contender, kind, checkpoints[family], tmp_path, workload)
    assert [len(row) for row in tokens] == [6, 6]
    if contender.draws_with_torch or not workload.sample:
        assert tokens == outcome(HuggingFace, kind, checkpoints[family], tmp_path, workload)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["fastgen", "ctranslate2", "openvino"])
def test_contender_gives_the_stock_hidden_states(name, ragged, checkpoints, tmp_path):
    skip_absent(name)
    workload = Encoding(batch=3, prompt_tokens=16, ragged=ragged)
    contender = encoders.CONTENDERS[name]
    hidden = outcome(contender, "encoder", checkpoints["bert"], tmp_path, workload)
    assert hidden.shape == (sum(workload.lengths), 32)
    expected = outcome(HuggingFaceEncoder, "encoder", checkpoints["bert"], tmp_path, workload)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


def test_compiled_contender_compiles_the_stock_forward(monkeypatch, checkpoints):
    compiled = []

    def compile_(function, **options):
        compiled.append(options)
        return lambda **kwargs: (compiled.append("called"), function(**kwargs))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    workload = Encoding(prompt_tokens=8)
    name = "hf-compile"
    hidden = outcome(encoders.CONTENDERS[name], "encoder", checkpoints["bert"], None, workload)
    assert compiled == [{"dynamic": False, "mode": None}, "called"]
    assert hidden.shape == (8, 32)


def test_an_encoder_without_a_fast_class_is_told(tmp_path):
    from transformers import RobertaConfig

    RobertaConfig(vocab_size=128).save_pretrained(tmp_path)
    contender = contenders("encoder")["fastgen"]("encoder", "cpu", torch.float32, 128)
    with pytest.raises(ValueError, match="no class for RobertaModel"):
        contender.load(str(tmp_path))


def test_ctranslate2_names_the_types_it_computes_in():
    library = pytest.importorskip("ctranslate2")
    supported = library.get_supported_compute_types("cpu")
    unsupported = {"float16", "bfloat16"} - supported
    if not unsupported:
        pytest.skip("this CPU computes in all types")
    with pytest.raises(ValueError, match=r"does not compute in .*only in .*float32"):
        ctranslate2("cpu", getattr(torch, unsupported.pop()))


def test_ctranslate2_converts_no_t5_encoder_alone(tmp_path):
    pytest.importorskip("ctranslate2")
    write_random_checkpoint("t5-tiny-encoder", tmp_path, dtype=torch.float32, device="cpu")
    contender = encoders.CTranslate2Encoder("encoder", "cpu", torch.float32, 128)
    with pytest.raises(ValueError, match="converts T5Config as seq2seq, not as encoder"):
        contender.prepare(str(tmp_path), tmp_path)
