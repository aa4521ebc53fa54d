"""Pages of a file: what the kernel tells of them, and that giving them back loses nothing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen import file_pages
from fastgen.file_pages import FilePages, unwritten

pytestmark = pytest.mark.skipif(
    not file_pages._told(), reason="the kernel does not tell of writes to pages"
)

ROWS = 40  # of a page each


@pytest.fixture(params=["searched", "listed"], autouse=True)
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which the kernel tells of pages."""
    if request.param == "listed":
        monkeypatch.setattr(file_pages, "_scans", lambda: False)
    elif not file_pages._scans():
        pytest.skip("this kernel does not search (Linux 6.7)")


def numbers(rows: int = ROWS) -> torch.Tensor:
    return torch.arange(rows * 1024, dtype=torch.float32).view(rows, 1024)


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Two matrices as they lie in a file."""
    save_file({"a": numbers(), "b": -numbers()}, tmp_path / "w.safetensors")
    return load_file(tmp_path / "w.safetensors")


def test_only_what_lies_in_a_file_is_of_a_file(weights: dict[str, torch.Tensor]) -> None:
    own = torch.zeros(2048)
    a, b = weights["a"], weights["b"]
    assert [id(t) for t in unwritten([own, a, torch.empty(0), b])] == [id(a), id(b)]
    assert unwritten([a[3:5]]) != []


EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda t: t.mul_(2),
    "of one number": lambda t: t[ROWS - 1, 1023].fill_(7),
    "through data": lambda t: t.data[1].neg_(),
    "through NumPy": lambda t: np.negative(t.numpy()[:1], out=t.numpy()[:1]),
    "with what was there": lambda t: t[0, 0].fill_(float(t[0, 0])),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_write_is_seen(weights: dict[str, torch.Tensor], edit: str) -> None:
    a, b = (FilePages([weights[name]]) for name in "ab")
    weights["a"].sum()  # to read is no write
    assert a.same()
    assert b.same()
    EDITS[edit](weights["a"])
    assert not a.same()
    assert unwritten([weights["a"]]) == []


def test_a_write_between_two_is_none_to_them(weights: dict[str, torch.Tensor]) -> None:
    a = weights["a"]
    pages = FilePages([a[:5], a[20:30]])
    a[10].neg_()
    assert pages.same()
    a[25].neg_()
    assert not pages.same()


def test_what_is_given_back_is_read_from_the_file_again(weights: dict[str, torch.Tensor]) -> None:
    pages = FilePages(unwritten(weights.values()))
    weights["a"].sum()  # or not all were in memory
    before = resident(weights["a"])
    pages.give_back()
    assert resident(weights["a"]) < before
    assert pages.same()
    assert torch.equal(weights["a"], numbers())
    assert torch.equal(weights["b"], -numbers())


def test_an_edit_is_never_given_back(weights: dict[str, torch.Tensor]) -> None:
    pages = FilePages(unwritten(weights.values()))
    weights["a"][2, 5] = -1
    with pages.given_back_meanwhile():
        weights["b"].sum()
    expected = numbers()
    expected[2, 5] = -1
    assert torch.equal(weights["a"], expected)
    assert not pages.same()


def test_a_file_that_is_written_to_is_seen_and_one_in_its_place_is_not(tmp_path: Path) -> None:
    path, other = tmp_path / "w.safetensors", tmp_path / "other"
    for file in (path, other):
        save_file({"a": numbers()}, file)
    a = load_file(path)["a"]
    pages = FilePages([a])
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    assert not pages.same()
    pages = FilePages([a])
    other.replace(path)
    assert pages.same()
    path.unlink()
    assert pages.same()
    assert FilePages(unwritten([a])).same()


def test_where_the_kernel_tells_nothing_nothing_is_of_a_file(
    weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_pages, "_told", lambda: False)
    assert unwritten(weights.values()) == []


def resident(tensor: torch.Tensor) -> int:
    """How many pages of a tensor are in memory, after a look at all of them."""
    first, end = (address // file_pages._PAGE for address in file_pages._span(tensor))
    with file_pages._pagemap() as pagemap:
        bits = np.frombuffer(os.pread(pagemap, 8 * (end - first), 8 * first), np.uint64)
    return int((bits >> np.uint64(63)).sum())
