import json

import pytest

from fastgen.bench import Encoding, Session, Workload, run
from fastgen.bench.generators import CONTENDERS, HuggingFace, HuggingFaceStatic

SMALL = {"repeats": 1, "min_seconds": 0.0}


@pytest.fixture
def tiny():
    with Session("t5-tiny@random", peers=["hf"], threads=1) as session:
        yield session


def test_entries_follow_from_the_measured_calls(tiny):
    workload = Workload(batch=2, new_tokens=5)
    ours, stock = tiny.measure(workload, fresh=False, **SMALL)
    assert (ours.name, stock.name) == ("fastgen", "hf")
    for entry in (ours, stock):
        assert entry.reason is None
        assert entry.new_tokens == 5
        assert entry.ms_per_token == pytest.approx(entry.calls_s[0] / 5 * 1e3)
        assert entry.tokens_per_s == pytest.approx(10 / entry.calls_s[0])
        assert entry.load_s is None
        assert entry.floor_bytes > 0
        assert entry.gb_per_s == pytest.approx(entry.floor_bytes / entry.ms_per_token / 1e6)
        assert entry.share_of_floor == pytest.approx(entry.floor_ms / entry.ms_per_token)
    assert stock.ratio == pytest.approx(stock.ms_per_token / ours.ms_per_token)
    assert ours.agreement.equal
    assert stock.agreement is None
    assert (ours.engine, stock.engine) == ("fast loop", None)


@pytest.mark.parametrize("model", ["bert-tiny@random", "t5-tiny-encoder@random"])
def test_an_encoder_is_measured_by_the_call(model):
    workload = Encoding(batch=3, prompt_tokens=24, ragged=True)
    with Session(model, peers=["hf", "hf-static"], threads=1) as session:
        entries = session.measure(workload, fresh=False, **SMALL)
        with pytest.raises(ValueError, match="Workload: no workload of"):
            session.measure(Workload())
    ours, stock = entries
    assert (ours.name, stock.name) == ("fastgen", "hf")
    assert ours.engine == "engine"
    assert ours.agreement.equal
    for entry in entries:
        assert entry.reason is None
        assert entry.ms_per_token is None
        assert entry.ms_per_call == pytest.approx(entry.calls_s[0] * 1e3)
        assert entry.tokens_per_s == pytest.approx(sum(workload.lengths) / entry.calls_s[0])
        assert entry.share_of_floor == pytest.approx(entry.floor_ms / entry.ms_per_call)


def test_a_model_without_an_encoder_generates_behind_its_prompt():
    with Session("gpt2-tiny@random", peers=["hf"], threads=1) as session:
        ours, stock = session.measure(Workload(batch=2, new_tokens=4), fresh=False, **SMALL)
    assert (ours.reason, stock.reason) == (None, None)
    assert (ours.new_tokens, stock.new_tokens) == (4, 4)
    assert ours.agreement.equal


def test_fresh_process_reports_load_time_and_memory(tiny):
    entries = tiny.measure(Workload(new_tokens=2), fresh=True, **SMALL)
    for entry in entries:
        assert entry.reason is None
        assert entry.load_s > 0
        assert 50e6 < entry.peak_bytes < 5e9


def test_one_session_measures_several_workloads(tiny):
    lengths = [tiny.measure(Workload(new_tokens=n), fresh=False, **SMALL) for n in (2, 4)]
    assert [entries[0].new_tokens for entries in lengths] == [2, 4]


def test_a_failing_contender_is_a_reason_and_the_others_are_measured(monkeypatch):
    class Absent(HuggingFaceStatic):
        package = "no-such-package-at-all"

    class Failing(HuggingFace):
        name = "ctranslate2"

        def call(self, inputs, workload):
            raise RuntimeError("boom")

    monkeypatch.setitem(CONTENDERS, "hf-static", Absent)
    monkeypatch.setitem(CONTENDERS, "ctranslate2", Failing)
    with Session("t5-tiny@random", peers=["hf", "hf-static", "ctranslate2"], threads=1) as session:
        entries = session.measure(Workload(new_tokens=2), fresh=False, **SMALL)
    reasons = {entry.name: entry.reason for entry in entries}
    assert reasons == {
        "fastgen": None,
        "hf": None,
        "hf-static": "not installed: pip install no-such-package-at-all",
        "ctranslate2": "RuntimeError: boom",
    }
    assert [entry.name for entry in entries if entry.ms_per_token] == ["fastgen", "hf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device 'tpu': allowed here are cpu"),
        ({"dtype": "int8"}, "dtype 'int8': allowed here are float32, float16, bfloat16"),
        ({"peers": ["hff"]}, "peer 'hff': allowed here are hf, hf-static, hf-compile, c"),
    ],
)
def test_wrong_options_name_the_allowed_ones(options, message):
    with pytest.raises(ValueError, match=message):
        Session("t5-tiny@random", **options)


def test_run_writes_a_flat_list_of_contenders(tmp_path):
    file = tmp_path / "figures.json"
    workloads = [Workload(new_tokens=2), Workload(new_tokens=3, beams=2)]
    report = run(["t5-tiny@random"], workloads, peers=["hf"], json_file=file, fresh=False, **SMALL)
    records = json.loads(file.read_text())
    assert [(record["name"], record["new_tokens"]) for record in records] == [
        ("fastgen", 2),
        ("hf", 2),
        ("fastgen", 3),
        ("hf", 3),
    ]
    assert records == json.loads(report.to_json())
    assert [Workload(**record["workload"]) for record in records[1::2]] == workloads
