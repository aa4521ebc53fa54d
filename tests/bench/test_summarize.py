import pytest

from benchmarks.summarize import cost_table, footnotes, plot, read, rows, speed_table
from fastgen.bench.agreement import Agreement, Distance
from fastgen.bench.environment import environment
from fastgen.bench.report import Entry, Report
from fastgen.bench.workload import Encoding, Workload


@pytest.fixture
def records(tmp_path):
    place = ("some-model", "cpu", "float32", Workload())
    ours = Entry("fastgen", *place, ms_per_token=0.5, ttft_ms=2)
    ours.agreement, ours.floor_ms = Agreement([None, 4]), 0.125
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
        ["fastgen", "2.00", "-", "-", "25.0%", "1 of 2 rows |"],
        ["hf", "5.00", "-", "1,024", "-", "- |"],
    ]


def test_an_encoder_is_told_by_the_call(tmp_path):
    workload = Encoding(2, 16)
    ours = Entry("fastgen", "m", "cpu", "float32", workload, ms_per_call=3.0)
    ours.agreement = Distance(1e-6, 2.0)
    file = tmp_path / "figures.json"
    file.write_text(Report(environment("cpu"), [ours]).to_json())
    grouped = rows(read([file]))
    assert speed_table(grouped).splitlines()[-1] == "| m | float32, cpu | 2 x 16 tokens | 3.000 |"
    cells = cost_table(grouped).splitlines()[-1].split(" | ")
    assert cells[2:] == ["fastgen", "-", "-", "-", "-", "within 1.0e-06 |"]


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
