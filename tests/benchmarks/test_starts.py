"""The table of starts: what is measured of a first and a second one."""

import sys

import pytest

from benchmarks import starts


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_row_of_two_starts() -> None:
    cells = [cell.strip() for cell in starts.row("t5-tiny", "int8", threads=1).split("|")[1:-1]]
    assert cells[:2] == ["t5-tiny", "`int8`"] and len(cells) == 7
    first, second = map(float, cells[2].split(" / "))
    assert first > 0 and second > 0
