import pytest

from benchmarks.summarize import cost_table, footnotes, plot, read, rows, speed_table
from fastgen.bench.environment import environment
from fastgen.bench.measure import Agreement
from fastgen.bench.report import Entry, Report
from fastgen.bench.workload import Workload


@pytest.fixture
def records(tmp_path):
    place = ("some-model", "cpu", "float32", Workload())
    ours = Entry("fastgen", *place, ms_per_token=0.5, ttft_ms=2, agreement=Agreement([None, 4]))
    peer = Entry("hf", *place, ms_per_token=4.0, ttft_ms=5, ratio=8.0, peak_bytes=2**30)
    absent = Entry("ctranslate2", *place, reason="not installed")
    file = tmp_path / "figures.json"
    file.write_text(Report(environment("cpu"), [ours, peer, absent]).to_json())
    return read([file])


def test_speed_table_has_a_line_for_each_workload(records):
    heading, _, line = speed_table(rows(records)).splitlines()
    assert heading == "| model | dtype | workload | fastgen | hf | ctranslate2 |"
    title = Workload().title
    assert line == f"| some-model | float32, cpu | {title} | 0.500 | 4.000 (8.0x) | - |"


def test_cost_table_has_a_line_for_each_contender_that_ran(records):
    lines = cost_table(rows(records)).splitlines()[2:]
    assert [line.split(" | ")[2:] for line in lines] == [
        ["fastgen", "2.00", "-", "-", "1 of 2 rows |"],
        ["hf", "5.00", "-", "1,024", "- |"],
    ]


def test_footnotes_tell_place_and_reasons(records):
    notes = footnotes(records)
    assert f"torch {environment('cpu')['versions']['torch']}" in notes
    assert "- ctranslate2: not installed" in notes


def test_plot_writes_an_image(records, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "latency.svg"
    plot(rows(records), file)
    assert "<svg" in file.read_text()


def test_other_json_is_refused(tmp_path):
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: not a file"):
        read([file])
