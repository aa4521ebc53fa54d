import pytest
import torch

from fastgen.bench.contenders import CONTENDERS, CTranslate2, HuggingFace
from fastgen.bench.shapes import SHAPES, write_random_checkpoint
from fastgen.bench.workload import Workload

WORKLOADS = [Workload(batch=2, new_tokens=6), Workload(batch=2, new_tokens=6, beams=3)]
SAMPLING = Workload(batch=2, new_tokens=6, sample=True)
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def outcome(contender_class, checkpoint, folder, workload):
    contender = contender_class("cpu", torch.float32, 128)
    contender.load(contender.prepare(str(checkpoint), folder))
    output = contender.generate(contender.inputs(workload), workload)
    return contender.tokens(output)


@pytest.fixture(params=["t5", "t5-v1_1"])
def checkpoint(request, tmp_path, monkeypatch):
    if request.param == "t5-v1_1":
        monkeypatch.setitem(SHAPES, "t5-tiny", SHAPES["t5-tiny"] | GATED)
    folder = tmp_path / "checkpoint"
    write_random_checkpoint("t5-tiny", folder, dtype=torch.float32, device="cpu")
    return folder


@pytest.mark.parametrize("workload", [*WORKLOADS, SAMPLING], ids=lambda workload: workload.title)
@pytest.mark.parametrize("name", CONTENDERS)
def test_contender_generates_the_stock_tokens(name, workload, checkpoint, tmp_path):
    contender = CONTENDERS[name]
    if name == "ctranslate2":
        pytest.importorskip("ctranslate2")
    tokens = outcome(contender, checkpoint, tmp_path, workload)
    assert [len(row) for row in tokens] == [6, 6]
    if contender.draws_with_torch or not workload.sample:
        assert tokens == outcome(HuggingFace, checkpoint, tmp_path, workload)


def test_ctranslate2_names_the_types_it_computes_in():
    ctranslate2 = pytest.importorskip("ctranslate2")
    supported = ctranslate2.get_supported_compute_types("cpu")
    unsupported = {"float16", "bfloat16"} - supported
    if not unsupported:
        pytest.skip("this CPU computes in all types")
    contender = CTranslate2("cpu", getattr(torch, unsupported.pop()), 128)
    with pytest.raises(ValueError, match=r"does not compute in .*only in .*float32"):
        contender.load("unused")
