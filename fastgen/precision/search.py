"""Which operations a model's float16 graphs must give in float32, found by trying."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from fastgen.graphs.shape import LAST_STATE
from fastgen.ops import names
from fastgen.ops.reference import LARGEST, Known, Seen
from fastgen.precision.cut import Operation, fewest_casts
from fastgen.precision.passes import ENCODED, Passes

_ROUNDS = 12  # each makes more operations float32; a chain of them seldom has three


@dataclass
class Found:
    """What is known of one operation."""

    name: str
    kind: str
    path: str
    """Of the part that it belongs to."""
    reads: set[str] = field(default_factory=set)
    largest: float = 0.0
    """Magnitude of its results, and of attention's scores; in float32."""
    read: float = 0.0
    """The same of what it reads."""
    loss: float = 0.0
    """Relative error of its float16 results, of the worst row; of exact inputs."""
    first_loss: float | None = None
    """The same before anything was chosen."""
    reason: str = ""
    """Why it is chosen; empty where it is not."""

    def exceeds(self, limit: float) -> bool:
        """Whether float16 has no room for it, or as a linear for what it reads."""
        return self.largest >= limit or (self.kind == "linear" and self.read >= limit)


@dataclass(frozen=True)
class Answer:
    """What was chosen, and what could not be helped."""

    wide: frozenset[str]
    found: dict[str, Found]
    problems: tuple[str, ...]
    casts: int


class Search:
    """Looks at every operation by the choice so far, and adds to it what is not good enough."""

    def __init__(self, passes: Passes, bound: float, headroom: float) -> None:
        self._passes, self._bound, self._limit = passes, bound, LARGEST / headroom
        self._found: dict[str, Found] = {}
        self._given: set[str] = set()
        """Operations whose results leave a graph."""

    def answer(self) -> Answer:
        wide: set[str] = set()
        for _ in range(_ROUNDS):
            self._look(wide)
            if not (more := self._more(wide)):
                break
            wide |= more
        needed = frozenset(n for n in wide if n in self._found)
        products = frozenset(n for n in needed if names.product(n) in wide)
        operations = [Operation(f.name, f.kind, tuple(f.reads)) for f in self._found.values()]
        full, casts = fewest_casts(operations, needed, products, frozenset(self._given))
        for name in full - needed:
            self._found[name].reason = "saves casts"
        self._look(wide | full)
        chosen = frozenset(wide | full)
        return Answer(chosen, self._found, tuple(self._problems(chosen)), casts)

    def _look(self, wide: Iterable[str]) -> None:
        for found in self._found.values():
            found.largest = found.read = found.loss = 0.0
        for results in self._passes.run(wide, self._note):
            self._given |= {name for x in results.values() if (name := x.name)}
        for found in self._found.values():
            if found.first_loss is None:
                found.first_loss = found.loss

    def _note(self, path: str, seen: Seen) -> None:
        name = path + seen.name
        found = self._found.setdefault(name, Found(name, seen.kind, path))
        found.reads |= {path + read.name for read in seen.reads if read.name}
        found.largest = max(found.largest, _largest(seen.exact), seen.inside)
        found.read = max([found.read, *(_largest(read.tensor) for read in seen.reads)])
        found.loss = max(found.loss, loss(seen.low, seen.exact))

    def _more(self, wide: set[str]) -> set[str]:
        """What else must be float32: first whatever overflows, since what reads it is lost, too."""
        more: set[str] = set()
        free = [f for f in self._found.values() if f.name not in self._given]
        for found in free:
            if found.name not in wide and found.exceeds(self._limit):
                found.reason = self._excess(found)
                more.add(found.name)
        if more:
            return more
        for found in self._found.values():
            if found.loss > self._bound:
                more |= self._for_less_loss(found, wide)
        return more

    def _for_less_loss(self, found: Found, wide: set[str]) -> set[str]:
        """An operation's own result in float32; else, or of a norm, which is computed in float32
        anyway, what it reads."""
        own = found.kind != "norm" and found.name not in self._given
        if own and found.name not in wide:
            found.reason = f"loses {found.loss:.1%}"
            return _choices(found)
        more = {names.product(found.name)} & _choices(found) if own else set()
        for read in found.reads - self._given:
            maker = self._found[read]
            maker.reason = maker.reason or f"{found.name} loses {found.loss:.1%}"
            more |= _choices(maker)
        return more - wide

    def _excess(self, found: Found) -> str:
        what, number = "gives", found.largest
        if number < self._limit:
            what, number = "reads", found.read
        how = "overflows" if number > LARGEST else f"too near to {LARGEST:.0f}"
        return f"{what} {number:.3g}: {how}"

    def _problems(self, wide: frozenset[str]) -> Iterable[str]:
        """What float32 results cannot mend."""
        for found in self._found.values():
            name = found.name
            if name in self._given and found.largest > LARGEST:
                yield f"{name} gives {found.largest:.3g}, and must leave its graph in float16"
            elif found.loss > self._bound:
                lost = f"loses {found.loss:.1%}" if math.isfinite(found.loss) else "overflows"
                yield f"{name} {lost}, whatever is kept in float32"


def _choices(found: Found) -> set[str]:
    """All that may be said of an operation to have it exact."""
    more = {names.product(found.name)} if found.kind == "linear" else set()
    return {found.name} | more


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else 0.0


def loss(low: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error of the worst row [.., E]; rows of next to nothing count as parts of all."""
    if not exact.numel():
        return 0.0
    if not bool(low.isfinite().all()):
        return math.inf
    error, size = ((low - exact).double().norm(dim=-1), exact.double().norm(dim=-1))
    least = size.square().mean().sqrt() * 1e-3
    worst = (error / size.clamp(min=float(least))).nan_to_num(0.0)
    return float(worst.amax())


def distance(found: Iterable[dict[str, Known]], exact: Iterable[dict[str, Known]]) -> float:
    """Relative error of what a model gives, of the worst batch: hidden states and logits."""
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        for name in (ENCODED, LAST_STATE, "logits"):
            if name in b:
                low, right = a[name].tensor.double(), b[name].tensor.double()
                error = float((low - right).norm() / right.norm())
                worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
