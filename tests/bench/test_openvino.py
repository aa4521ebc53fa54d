"""OpenVINO as a peer, with a stand-in for optimum-intel in the other process."""

import os
import stat
import sys
from pathlib import Path

import pytest

from fastgen.bench import Encoding, Session, Workload
from fastgen.bench.fresh import Job, measure_fresh
from fastgen.bench.openvino import PYTHON

STAND_IN = """
import json
from pathlib import Path

import transformers

print("libraries print what they like")


def stand_in(auto):
    class Model:
        @classmethod
        def from_pretrained(cls, folder, ov_config=None, **asked):
            made = cls()
            if ov_config is None:
                made.asked = {"from": folder, **asked}
                return made
            asked = json.loads((Path(folder) / "asked.json").read_text())
            assert ov_config["INFERENCE_PRECISION_HINT"] == "f32"
            made.model = getattr(transformers, auto).from_pretrained(asked["from"]).eval()
            made.generate = getattr(made.model, "generate", None)
            return made

        def save_pretrained(self, folder):
            Path(folder).mkdir()
            (Path(folder) / "asked.json").write_text(json.dumps(self.asked))

        def __call__(self, **kwargs):
            return self.model(**kwargs)

    return Model


OVModelForSeq2SeqLM = stand_in("AutoModelForSeq2SeqLM")
OVModelForCausalLM = stand_in("AutoModelForCausalLM")
OVModelForFeatureExtraction = stand_in("AutoModel")
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a program is a shell script")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the path of the Python that is named as OpenVINO's."""
    python, packages = tmp_path / "python", tmp_path / "packages"
    (packages / "optimum").mkdir(parents=True)
    (packages / "optimum" / "intel.py").write_text(STAND_IN)
    for name in ("openvino", "optimum_intel"):
        (packages / f"{name}-1.2.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n"
        (packages / f"{name}-1.2.dist-info" / "METADATA").write_text(metadata)
    path = os.pathsep.join([str(packages), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    python.write_text(f"#!/bin/sh\nPYTHONPATH='{path}' exec '{sys.executable}' \"$@\"\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(PYTHON, str(python))
    return packages


WORKLOADS = {
    "t5-tiny@random": Workload(batch=2, new_tokens=4, beams=2),
    "gpt2-tiny@random": Workload(batch=2, new_tokens=4),
    "bert-tiny@random": Encoding(batch=3, prompt_tokens=24, ragged=True),
}


@pytest.mark.parametrize("model", WORKLOADS)
def test_what_it_gives_is_compared(model: str, environment: Path) -> None:
    with Session(model, peers=["hf", "openvino"], threads=1) as session:
        workload = WORKLOADS[model]
        entries = session.measure(workload, fresh=False, repeats=1, min_seconds=0.0)
        process = session.contenders["openvino"].process
    ours, _, peer = entries
    assert [entry.reason for entry in entries] == [None] * 3
    assert peer.version == "1.2 (optimum-intel 1.2)"
    assert peer.agreement.equal
    assert peer.ratio == pytest.approx(peer.ms_per_call / ours.ms_per_call)
    assert process not in (None, os.getpid())
    with pytest.raises(ProcessLookupError):  # it ended with the session
        os.kill(process, 0)


def test_its_memory_is_that_of_its_process(environment: Path, tmp_path: Path) -> None:
    workload = WORKLOADS["gpt2-tiny@random"]
    with Session("gpt2-tiny@random", peers=["openvino-int8"], threads=1) as session:
        folder = session.paths["openvino-int8"]
        assert '"load_in_8bit": true' in (Path(folder) / "asked.json").read_text()
        job = Job("openvino-int8", "causal", folder, "cpu", "float32", 1, 128, workload.as_dict())
        (environment / "optimum" / "intel.py").open("a").write("\nkept = bytearray(2_000_000_000)")
        assert measure_fresh(job).peak_bytes > 2e9


def test_without_an_environment_the_reason_says_how_to_make_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    assert reason_of() == (
        f"{PYTHON}: not set; it names the Python of an environment that has OpenVINO: "
        "python -m venv ov && ov/bin/pip install 'optimum-intel[openvino]' 'transformers<5.6' "
        f"&& export {PYTHON}=$PWD/ov/bin/python"
    )
    monkeypatch.setenv(PYTHON, "no-such-python")
    assert reason_of().startswith(f"{PYTHON}: 'no-such-python' is no program; it names")
    monkeypatch.setenv(PYTHON, "false")
    assert reason_of().startswith(f"{PYTHON}: OpenVINO's process ended: exit 1; it names")


def test_what_fails_in_its_process_is_the_reason(environment: Path) -> None:
    (environment / "optimum" / "intel.py").write_text("raise ImportError('no such library')")
    assert reason_of() == "RuntimeError: in OpenVINO's process: ImportError: no such library"


def reason_of() -> str:
    with Session("t5-tiny@random", peers=["openvino"], threads=1) as session:
        _, peer = session.measure(Workload(new_tokens=2), fresh=False, repeats=1, min_seconds=0.0)
        return peer.reason
