"""The table of precisions: what is compared with what."""

import sys

import pytest

from benchmarks import precision


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_fp32_agrees_with_stock_and_fewer_bits_do_not_quite() -> None:
    rows = {kind: precision.measure("docstrings", kind, threads=1) for kind in ("fp32", "int4")}
    assert rows["fp32"].same_tokens == 1 and rows["fp32"].logit_error < 1e-5
    assert 0.5 < rows["int4"].same_tokens < 1 and 1e-3 < rows["int4"].logit_error < 0.5
    assert all(row.ms > 0 for row in rows.values())


def test_each_row_is_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    class Done:
        stdout = 'noise\n{"ms": 1.5, "megabytes": 20, "same_tokens": 0.5, "logit_error": 0.01}\n'

    def run(command: list[str], **_: object) -> Done:
        commands.append(command)
        return Done()

    monkeypatch.setattr(precision.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["precision", "--models", "pronounce", "--threads", "3"])
    precision.main()
    assert [command[-3] for command in commands] == [*precision.PRECISIONS]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| pronounce | fp32 | 1.50 | 20 | 50.0% | 1.00% |"
    assert len(lines) == 2 + len(precision.PRECISIONS)
