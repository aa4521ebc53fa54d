"""Memory that a file backs: only what the file holds leaves the process."""

import sys
from pathlib import Path

import pytest
import torch

from fastgen.hf.mapped import give_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of mappings")
ELEMENTS = 1 << 18


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    """[ELEMENTS] float32, mapped privately from a file, as a checkpoint's weights, and read."""
    path = tmp_path / "weights"
    path.write_bytes(torch.arange(ELEMENTS).float().numpy().tobytes())
    tensor = torch.from_file(str(path), shared=False, size=ELEMENTS)
    tensor.sum()
    return tensor


def resident(tensor: torch.Tensor) -> int:
    """Kilobytes of the mapping that a tensor lies in."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, dash, rest = line.partition("-")
        if dash and " " not in first:
            here = int(first, 16) <= tensor.data_ptr() < int(rest.split()[0], 16)
        elif here and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("no mapping")


def place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.nbytes


def test_what_a_file_holds_goes_and_comes_back(mapped: torch.Tensor) -> None:
    before = resident(mapped)
    give_back([place(mapped)])
    assert resident(mapped) == 0 < before
    assert torch.equal(mapped, torch.arange(ELEMENTS).float())


def test_only_whole_pages_in_the_range_go(mapped: torch.Tensor) -> None:
    before = resident(mapped)
    give_back([place(mapped[1 : ELEMENTS // 2 + 1])])
    assert resident(mapped) == before // 2 + 4  # kilobytes of the page whose first number stays


def test_edits_stay(mapped: torch.Tensor) -> None:
    mapped[5] = -1.0
    give_back([place(mapped)])
    assert mapped[5] == -1.0 and mapped[6] == 6.0


def test_what_no_file_backs_stays() -> None:
    tensor = torch.arange(ELEMENTS).float()
    give_back([place(tensor), (tensor.data_ptr(), 0), (1 << 20, 1 << 20)])
    assert torch.equal(tensor, torch.arange(ELEMENTS).float())


def test_where_the_system_does_not_tell(
    mapped: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", none)
    give_back([place(mapped)])
    assert mapped[5] == 5.0
