import json

import pytest
from rich.console import Console

from fastgen.bench.environment import describe, environment
from fastgen.bench.measure import Agreement
from fastgen.bench.report import Entry, Report
from fastgen.bench.workload import Workload

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
    assert any(" ".join(line.split()) == "fastgen 0.250 - - - 3 - 1 of 2 rows" for line in lines)
    assert any(line.split() == ["ctranslate2", *"-------"] for line in lines)
    assert "ctranslate2: not installed: pip install ctranslate2" in lines
    assert any("row 1 from new token 3" in line for line in lines)


def test_description_names_hardware_and_versions():
    facts = environment("cpu")
    text = describe(facts)
    assert facts["cpu"] in text
    assert f"torch {facts['versions']['torch']}" in text
