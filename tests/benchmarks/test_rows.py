"""The table of products by rows: each form of a weight gives the product."""

import numpy as np
import pytest

from benchmarks import rows


@pytest.mark.parametrize("kind", ["full", "int8", "int4"])
def test_each_form_is_a_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_SECONDS", 0.001)
    product = rows.session(kind, outputs=64, inputs=128, threads=1)
    assert rows.microseconds(product, 3, 128) > 0
    identity = np.eye(128, dtype=np.float32)
    found = product.run(None, {"x": identity})[0]
    assert found.shape == (128, 64) and 0.8 < found.std() < 1.2


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rows, "_SECONDS", 0.001)
    arguments = ["rows", "--outputs", "64", "--inputs", "64", "--threads", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    rows.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`full`", "`int8`", "`int4`"]
    assert {line.count("|") for line in lines} == {len(rows.ROWS) + 2}
