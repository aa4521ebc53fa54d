"""The table of precisions: what is compared with what."""

import email
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import precision
from examples.docstrings.data import docstrings


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("name", ["docstrings", "minilm"])
def test_fp32_agrees_with_stock_and_fewer_bits_do_not_quite(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "ROWS", 8)
    monkeypatch.setattr(precision, "RIVALS", 24)
    few = docstrings(Path(email.__file__).parent)
    monkeypatch.setattr(precision, "texts", lambda: few)
    if name == "minilm":
        pytest.importorskip(precision.MINILM)
    with torch.inference_mode():
        model = precision.Model(name, tmp_path, "cpu", None)
    kinds = precision.PRECISIONS["cpu"]
    rows = {kind: precision.measure(model, kinds[kind]) for kind in ("fp32", "int4")}
    assert rows["fp32"].error < 1e-5 and 1e-3 < rows["int4"].error < 0.5
    if name == "docstrings":
        assert rows["fp32"].same_tokens == 1
        assert 0.5 < rows["int4"].same_tokens < 1
    solved = [row.task for row in rows.values()]
    assert all(0.3 < share <= 1 for share in solved) and solved[0] >= solved[1] - 0.1
    assert all(row.ms > 0 for row in rows.values())


def test_each_row_is_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    class Done:
        row = precision.Row("fast loop", 1.5, 20, 0, 0.5, 0.01, None)
        stdout = f"noise\n{json.dumps(vars(row))}\n"

    def run(command: list[str], **_: object) -> Done:
        commands.append(command)
        return Done()

    monkeypatch.setattr(precision.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["precision", "--models", "pronounce", "--threads", "3"])
    precision.main()
    known = precision.PRECISIONS["cpu"]
    assert [command[-3] for command in commands] == [*known]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| pronounce | fp32 | 1.50 | 20 | 50.0% | 1.00% | - |"
    assert len(lines) == 2 + len(known)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_rows_of_a_gpu_say_who_ran_them() -> None:
    row = precision.Row("fused", 0.25, 1000, 1200, None, 0.002, 0.875)
    line = row.line("minilm", "bf16", "cuda")
    assert line == "| minilm | bf16 | fused | 0.25 | 1000 | 1200 | - | 0.20% | 87.5% |"
    assert line.count("|") == precision.HEAD["cuda"].count("|")


def test_a_precision_that_a_device_has_not_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["precision", "--precisions", "fp8"])
    with pytest.raises(SystemExit):
        precision.main()
    assert "on cpu there are fp32, int8, int4" in capsys.readouterr().err
