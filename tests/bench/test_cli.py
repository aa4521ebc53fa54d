import json

import pytest
import typer
from typer.testing import CliRunner

from fastgen.bench import report as report_module
from fastgen.bench.cli import bench

app = typer.Typer()
app.command()(bench)

QUICK = ["--against", "hf", "--repeats", "1", "--min-seconds", "0", "--no-fresh", "--threads", "1"]


def test_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "out.json"
    result = CliRunner().invoke(
        app,
        ["t5-tiny@random", *QUICK, "--new-tokens", "3", "--beams", "2", "--json", str(file)],
    )
    assert result.exit_code == 0, result.output
    assert "t5-tiny@random, cpu, float32: 2 beams" in result.output
    assert [record["name"] for record in json.loads(file.read_text())] == ["fastgen", "hf"]


def test_failures_set_the_exit_code(monkeypatch):
    monkeypatch.setattr(report_module.Report, "failures", lambda self: ["tokens differ"])
    result = CliRunner().invoke(app, ["t5-tiny@random", *QUICK, "--new-tokens", "2"])
    assert result.exit_code == 1
    assert "FAILED: tokens differ" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t5-tinny@random"], "Did you mean"),
        (["t5-tiny@random", "--against", "onnx"], "onnx"),
        (["t5-tiny@random", "--sample", "--beams", "2"], "beam"),
    ],
)
def test_wrong_arguments_are_told(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
