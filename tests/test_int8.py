"""Weights as 8-bit integers with a step for each output."""

from itertools import product

import pytest
import torch

from fastgen.int8 import Rows, made, source

WEIGHT = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
WEIGHT[3] = 0


@pytest.mark.parametrize("flags", [*product([False, True], repeat=3)])
def test_integers_are_half_a_step_off_at_most(flags: tuple[bool, bool, bool]) -> None:
    rows = Rows(*flags)
    values, steps = (
        made(name, WEIGHT.t().contiguous() if rows.transposed else WEIGHT)
        for name in rows.names("a.weight")
    )
    assert values.dtype == (torch.uint8 if rows.unsigned else torch.int8)
    assert values.is_contiguous() and steps.shape == (5,)
    whole = values.float() - 128 * rows.unsigned
    whole = (whole.t() if rows.inputs_first else whole) * steps[:, None]
    assert ((whole - WEIGHT).abs() <= steps[:, None] / 2 + 1e-6).all()
    assert (whole[3] == 0).all()


def test_names_tell_what_they_are_made_of() -> None:
    names = Rows(False, True, False).names("a.b.weight")
    assert [*map(source, names)] == ["a.b.weight"] * 2
    assert source("a.b.weight") is None and source("a:b") is None
