"""The fewest casts, against all choices that there are."""

import itertools
import random

import pytest

from fastgen.precision.cut import ELEMENTWISE, Operation, fewest_casts


def casts(operations: list[Operation], wide: set[str], products: set[str], given: set[str]) -> int:
    """Values that somebody reads in the other dtype than they are given in, each once."""
    read_as: dict[str, set[bool]] = {o.name: set() for o in operations}
    for operation in operations:
        as_float32 = operation.name in (products if operation.kind == "linear" else wide)
        for read in operation.reads:
            if operation.kind != "norm":
                read_as[read].add(as_float32)
    for name in given:
        read_as[name].add(False)
    return sum((name not in wide) in found for name, found in read_as.items())


def some_graph(seed: int) -> list[Operation]:
    draw = random.Random(seed)
    kinds = [*ELEMENTWISE, *ELEMENTWISE, "linear", "norm", "attention"]
    found: list[Operation] = [Operation("0", "embedding", ())]
    for i in range(1, 11):
        kind = draw.choice(kinds)
        count = {"attention": 3, "linear": 1, "norm": 1, "activation": 1}.get(kind, 2)
        reads = [str(draw.randrange(max(0, i - 4), i)) for _ in range(count)]
        found.append(Operation(str(i), kind, tuple(reads)))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_no_other_choice_has_fewer_casts_and_none_as_few_is_smaller(seed: int) -> None:
    operations, draw = some_graph(seed), random.Random(seed)
    names = [o.name for o in operations]
    wide = set(draw.sample(names, 4))
    products = {o.name for o in operations if o.kind == "linear" and o.name in wide} & {"2", "5"}
    given = {names[-1]}
    found, count = fewest_casts(operations, frozenset(wide), frozenset(products), frozenset(given))
    free = [o.name for o in operations if o.kind in ELEMENTWISE and o.name not in wide]
    assert wide <= found <= wide | {*free}
    choices = [
        wide | set(some) for n in range(len(free) + 1) for some in itertools.combinations(free, n)
    ]
    counts = [casts(operations, choice, products, given) for choice in choices]
    assert casts(operations, set(found), products, given) == count == min(counts)
    least = min(len(c) for c, n in zip(choices, counts, strict=True) if n == min(counts))
    assert len(found) == least


def test_what_lies_between_two_float32_operations_joins_them() -> None:
    operations = [
        Operation("up", "linear", ()),
        Operation("act", "activation", ("up",)),
        Operation("gate", "multiply", ("act", "other")),
        Operation("other", "linear", ()),
        Operation("down", "linear", ("gate",)),
    ]
    wide, given = frozenset({"up", "gate"}), frozenset({"down"})
    found, count = fewest_casts(operations, wide, frozenset(), given)
    assert found == {"up", "act", "gate"}
    assert count == 2  # "other" before it is multiplied, and "gate" before the last product
