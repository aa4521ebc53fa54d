import json

import pytest
from rich.console import Console

from fastgen.bench.agreement import Agreement, Distance
from fastgen.bench.environment import describe, environment
from fastgen.bench.report import Entry, Report
from fastgen.bench.workload import Encoding, Workload

WORKLOAD = Workload(new_tokens=4)


def entry(name, **fields):
    options = {"model": "m", "device": "cpu", "dtype": "float32", "workload": WORKLOAD} | fields
    return Entry(name, **options)


def report(*entries):
    return Report(environment("cpu"), list(entries))


def test_json_has_the_documented_fields_and_ratio_only_for_peers():
    figures = {
        "ms_per_token": 2.0,
        "tokens_per_s": 500.0,
        "ttft_ms": 3.0,
        "load_s": 1.5,
        "peak_bytes": 1000,
    }
    records = json.loads(report(entry("fastgen", **figures), entry("hf", ratio=4.0)).to_json())
    ours, peer = records
    assert {key: ours[key] for key in figures} == figures
    assert "ratio" not in ours
    assert peer["ratio"] == 4.0
    assert ours["environment"]["versions"]["torch"]


@pytest.mark.parametrize(
    ("fields", "failures"),
    [
        ({"agreement": Agreement([None])}, 0),
        ({"agreement": Agreement([3])}, 1),
        ({"agreement": Agreement([3]), "dtype": "bfloat16"}, 0),
        ({"agreement": Distance(0.01, 1.0)}, 1),
        ({"agreement": Distance(0.00001, 1.0)}, 0),
        ({"agreement": Agreement([3]), "device": "cuda"}, 0),
        ({"reason": "MissingRuntimeError: none"}, 1),
    ],
)
def test_failures_are_wrong_tokens_where_exactness_holds_and_not_running(fields, failures):
    assert len(report(entry("fastgen", **fields)).failures()) == failures
    peer_only = report(entry("fastgen"), entry("hf-static", **fields))
    assert peer_only.failures() == []


def test_table_shows_figures_dashes_and_reasons():
    console = Console(width=100, record=True)
    report(
        entry("fastgen", ms_per_token=0.25, peak_bytes=3 * 2**20, agreement=Agreement([None, 3])),
        entry("ctranslate2", reason="not installed: pip install ctranslate2"),
    ).print(console)
    lines = console.export_text().splitlines()
    assert any(" ".join(line.split()) == "fastgen 0.250 - - 3 - - - 1 of 2 rows" for line in lines)
    assert any(line.split() == ["ctranslate2", *"--------"] for line in lines)
    assert "ctranslate2: not installed: pip install ctranslate2" in lines
    assert any("row 1 from new token 3" in line for line in lines)


def test_table_shows_the_floor_and_which_engine_ran():
    console = Console(width=80, record=True)
    place = {"workload": Encoding(4, 16, ragged=True), "ms_per_call": 2.0, "gb_per_s": 1.5}
    floor = {"floor_ms": 0.5, "tflop_per_s": 0.25}
    report(
        entry("fastgen", **place, **floor, engine="engine", agreement=Distance(1e-6, 2.0)),
    ).print(console)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "m, cpu, float32: 4 rows of 2 to 16 tokens" in lines
    assert "contender ms/call tokens/s load s MiB GB/s floor ratio max diff" in lines
    assert "fastgen 2.000 - - - 1.5 25.0% - 1.0e-06" in lines
    assert "fastgen ran: engine" in lines
    computing = report(entry("fastgen", **place, **floor, computes=True))
    computing.print(console)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "contender ms/call tokens/s load s MiB TFLOP/s floor ratio max diff" in lines
    assert "fastgen 2.000 - - - 0.250 25.0% - -" in lines


def test_description_names_hardware_and_versions():
    facts = environment("cpu")
    text = describe(facts)
    assert facts["cpu"] in text
    assert f"torch {facts['versions']['torch']}" in text
