import json

import pytest

from fastgen.bench import Session, Workload, run
from fastgen.bench.contenders import CONTENDERS, HuggingFace, HuggingFaceStatic

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
    assert stock.ratio == pytest.approx(stock.ms_per_token / ours.ms_per_token)
    assert ours.agreement.equal
    assert stock.agreement is None


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
        name = "failing"

        def generate(self, inputs, workload):
            raise RuntimeError("boom")

    monkeypatch.setitem(CONTENDERS, "hf-static", Absent)
    monkeypatch.setitem(CONTENDERS, "failing", Failing)
    with Session("t5-tiny@random", peers=["hf", "hf-static", "failing"], threads=1) as session:
        entries = session.measure(Workload(new_tokens=2), fresh=False, **SMALL)
    reasons = {entry.name: entry.reason for entry in entries}
    assert reasons == {
        "fastgen": None,
        "hf": None,
        "hf-static": "not installed: pip install no-such-package-at-all",
        "failing": "RuntimeError: boom",
    }
    assert [entry.name for entry in entries if entry.ms_per_token] == ["fastgen", "hf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device 'tpu': allowed here are cpu"),
        ({"dtype": "int8"}, "dtype 'int8': allowed here are float32, float16, bfloat16"),
        ({"peers": ["hff"]}, "peer 'hff': allowed here are hf, hf-static, ctranslate2"),
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
