"""The table of first tokens: a row measures whole calls."""

import pytest
import torch

from benchmarks import first_token


@pytest.mark.parametrize("name", ["t5-tiny", "gpt2-tiny"])
def test_a_row_has_every_column(name: str) -> None:
    row = first_token.row(name, "cpu", torch.float32, times=2)
    found = [part.strip() for part in row.strip("|").split("|")]
    assert found[0] == name and len(found) == 5
    assert all(float(part) > 0 for part in found[1:])
