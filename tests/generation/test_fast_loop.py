"""The fast loop returns what the stock class does, over random combinations of arguments.

`python -m tests.generation.sweep --examples 2000` looks at many more of them.
"""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from tests.generation.calls import GenerateCall, calls
from tests.generation.compare import check_call, hangs_on_a_near_tie

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
