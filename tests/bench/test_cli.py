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


def test_encoders_and_models_that_generate_in_one_command(tmp_path):
    file = tmp_path / "out.json"
    models = ["bert-tiny@random", "gpt2-tiny@random"]
    result = CliRunner().invoke(app, [*models, *QUICK, "--new-tokens", "2", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "bert-tiny@random, cpu, float32: 1 x 32 tokens" in result.output
    assert "fastgen ran: engine" in result.output
    assert "fastgen ran: fast loop" in result.output
    kinds = [record["ms_per_token"] is None for record in json.loads(file.read_text())]
    assert kinds == [True, True, False, False]


def test_without_a_terminal_each_step_is_told_once_on_stderr():
    result = CliRunner().invoke(
        app, ["t5-tiny@random", *QUICK, "--repeats", "3", "--new-tokens", "2"]
    )
    told = [line.removeprefix("fastgen bench: ") for line in result.stderr.splitlines()]
    assert told == [
        "drawing the weights of t5-tiny@random",
        *("preparing fastgen", "loading fastgen", "preparing hf", "loading hf"),
        "measuring the machine",
        *("first call of fastgen", "first call of hf", "warming up fastgen", "warming up hf"),
        "timing",
    ]
    assert "fastgen bench:" not in result.stdout
    assert "t5-tiny@random, cpu, float32: greedy" in result.stdout


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
        (["gpt2-tiny@random", "--ragged"], "only of encoders"),
    ],
)
def test_wrong_arguments_are_told(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
