"""Which further operations to keep in float32, so that the fewest casts are left.

Operations are either float32 (the source's side of a minimum cut) or float16 (the sink's). Each
value that is read on the other side costs one cast, whoever reads it there.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ELEMENTWISE = ("activation", "multiply", "add", "sum")
"""Kinds of operation that are as exact in either dtype, and cost as much."""
_NEVER = 1 << 30  # no cut goes here


@dataclass(frozen=True)
class Operation:
    """What a graph computes, as a cut sees it."""

    name: str
    kind: str
    reads: tuple[str, ...]
    """Names of the operations whose results it reads."""


def fewest_casts(
    operations: Sequence[Operation],
    wide: frozenset[str],
    products: frozenset[str],
    given: frozenset[str],
) -> tuple[frozenset[str], int]:
    """The operations to keep in float32: those of ``wide``, and as few others as leave the fewest
    casts of values between the two dtypes; and how many those are.

    Args:
        wide: operations that must be float32.
        products: the linears among them that also multiply in float32.
        given: operations whose results leave the graph, in float16.
    """
    net = _Net()
    readers: dict[str, set[str]] = defaultdict(set)
    for operation in operations:
        name, kind = operation.name, operation.kind
        if name in wide:
            net.join(_SOURCE, name, _NEVER)
        elif kind not in ELEMENTWISE:  # float16 by nature
            net.join(name, _SINK, _NEVER)
        reader = name if kind in ELEMENTWISE or kind == "attention" else f"{name}, reading"
        if kind == "linear":
            reads = (_SOURCE, reader) if name in products else (reader, _SINK)
            net.join(*reads, _NEVER)
        if kind != "norm":  # which reads either
            for read in operation.reads:
                readers[read].add(reader)
    for name in given:
        readers[name].add(_SINK)
    for name, found in readers.items():
        narrowed, widened = f"{name}, cast to float16", f"{name}, cast to float32"
        net.join(name, narrowed, 1)
        net.join(widened, name, 1)
        for reader in found:
            net.join(narrowed, reader, _NEVER)
            net.join(reader, widened, _NEVER)
    casts, wider = net.cut()
    elementwise = {o.name for o in operations if o.kind in ELEMENTWISE}
    return wide | frozenset(wider & elementwise), casts


_SOURCE, _SINK = "float32", "float16"


class _Net:
    """Capacities between nodes, cut where they are least."""

    def __init__(self) -> None:
        self._left: dict[str, dict[str, int]] = defaultdict(dict)

    def join(self, start: str, end: str, capacity: int) -> None:
        self._left[start][end] = max(self._left[start].get(end, 0), capacity)
        self._left[end].setdefault(start, 0)

    def cut(self) -> tuple[int, set[str]]:
        """The least capacity that parts source and sink, and the smallest source's side of it."""
        total = 0
        while (path := self._path())[1]:
            before, node, capacity = path[0], _SINK, _NEVER
            while node != _SOURCE:
                capacity = min(capacity, self._left[before[node]][node])
                node = before[node]
            node = _SINK
            while node != _SOURCE:
                self._left[before[node]][node] -= capacity
                self._left[node][before[node]] += capacity
                node = before[node]
            total += capacity
        return total, set(path[0])

    def _path(self) -> tuple[Mapping[str, str], bool]:
        """From where each node is reached with capacity left, and whether the sink is."""
        before, queue = {_SOURCE: _SOURCE}, deque([_SOURCE])
        while queue:
            node = queue.popleft()
            for end, left in self._left[node].items():
                if left and end not in before:
                    before[end] = node
                    if end == _SINK:
                        return before, True
                    queue.append(end)
        return before, False
