"""The fast loop returns what the stock class does, over random combinations of arguments.

`python -m tests.generation.sweep --examples 2000` looks at many more of them.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.generation.calls import GenerateCall, calls
from tests.generation.compare import check_call, difference, hangs_on_a_near_tie, run

_near_ties: list[GenerateCall] = []


@settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(calls())
def test_as_the_stock_class(call: GenerateCall) -> None:
    if differs := check_call(call):
        assert hangs_on_a_near_tie(call), differs
        _near_ties.append(call)
        assert len(_near_ties) <= 3, "too many differences to blame all on rounding"


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.5, 0.0, 0.5, 3.0])
def test_when_beams_stop(length_penalty: float, early_stopping: bool | str) -> None:
    """Ends are likely here, and the scores show how long the search went on."""
    arguments = {"num_beams": 3, "max_new_tokens": 14, "eos_token_id": [*range(1, 12)]}
    arguments |= {"length_penalty": length_penalty, "early_stopping": early_stopping}
    arguments |= {"return_dict_in_generate": True, "output_scores": True}
    for seed in range(8):
        call = GenerateCall("t5-1.1", seed, 1 + seed % 2, None, 1, arguments)
        differs = difference(run("stock", call), run("fast loop", call))
        assert not differs or hangs_on_a_near_tie(call), differs
