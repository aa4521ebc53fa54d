"""Decided once an encoder's launches are recorded: where scratch lies, what is fetched early."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from fastgen.engines.fused.packed_kernels import Prefetch
from fastgen.engines.fused.packed_products import Products, Recorded
from fastgen.engines.fused.packed_values import Buffer, Size

MOST_FETCHED = 24 * 2**20  # bytes


def allocate(
    launches: Sequence[Recorded],
    make: Callable[[int, torch.dtype | None], torch.Tensor],
    kept: Sequence[Buffer],
) -> list[Recorded]:
    """Give buffers their memory: one whose last reader has run leaves its to the next like it.

    Args:
        make: memory of so many columns of a dtype; None is that of activations.
        kept: what is written or read outside of these launches.

    Returns:
        The launches, of which those that are the last to read what one of them made let it go.
    """
    last = {b: i for i, each in enumerate(launches) for b in (*each.reads, *each.writes)}
    idle: dict[tuple[int, torch.dtype | None], list[torch.Tensor]] = defaultdict(list)
    for buffer in kept:
        if buffer.tensor is None:
            buffer.tensor = make(buffer.width, buffer.dtype)
    run: list[Recorded] = []
    for i, each in enumerate(launches):
        for buffer in each.writes:
            if buffer.tensor is None and not buffer.made:
                free = idle[buffer.width, buffer.dtype]
                buffer.tensor = free.pop() if free else make(buffer.width, buffer.dtype)
        run.append(each)
        ended = {b for b in (*each.reads, *each.writes) if last[b] == i and b not in kept}
        for buffer in ended:
            if not buffer.made:
                idle[buffer.width, buffer.dtype].append(buffer.tensor)
        if made := [buffer for buffer in ended if buffer.made]:
            run.append(Release(made))
    return run


def fetch_ahead(launches: Sequence[Recorded]) -> list[Prefetch]:
    """Let each group of products that run side by side fetch the weights of those behind it, up to
    the next group's, or as many as the L2 cache holds beside what runs."""
    found: list[Prefetch] = []
    group: Products | None = None
    weights: list[torch.Tensor] = []
    for each in [*(each for each in launches if isinstance(each, Products)), None]:
        if each is not None:
            weights += [p.matrix for p in each.products if p.made_of is None]
        if each is not None and len(each.products) == 1:
            continue
        totals = accumulate(weight.nbytes for weight in weights)
        fitting = [w for w, sum_ in zip(weights, totals, strict=True) if sum_ <= MOST_FETCHED]
        if group is not None and fitting:
            group.ahead = Prefetch(fitting)
            found.append(group.ahead)
        group, weights = each, []
    return found


@dataclass(frozen=True)
class Release:
    """Gives back what a launch made, for the next one's."""

    buffers: Sequence[Buffer]
    reads: Sequence[Buffer] = ()
    writes: Sequence[Buffer] = ()

    def __call__(self, size: Size) -> None:
        for buffer in self.buffers:
            buffer.tensor = None
