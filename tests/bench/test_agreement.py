import pytest
import torch

from fastgen.bench.agreement import Agreement, Distance, agreement


@pytest.mark.parametrize(
    ("row", "expected"), [([1, 2, 3], None), ([1, 9, 3], 1), ([1, 2], 2), ([1, 2, 3, 4], 3)]
)
def test_agreement_finds_the_first_difference(row, expected):
    agreement = Agreement.of([row, [5]], [[1, 2, 3], [5]])
    assert agreement.first_difference == [expected, None]
    assert agreement.equal is (expected is None)
    assert agreement.summary == ("equal" if expected is None else "1 of 2 rows")
    if expected is not None:
        assert f"row 0 from new token {expected}" in str(agreement)


def test_distance_is_the_largest_difference_beside_the_largest_element():
    reference = torch.tensor([[1.0, -4.0], [2.0, 3.0]])
    near, far = reference + torch.tensor([0.0, 3e-4]), reference + torch.tensor([0.5, 0.0])
    found = agreement(far, reference)
    assert isinstance(found, Distance)
    assert (found.largest, found.scale, found.equal) == (0.5, 4.0, False)
    assert found.summary == "5.0e-01"
    assert "differ from hf's by 0.5" in str(found)
    assert agreement(near, reference).equal
