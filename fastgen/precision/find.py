"""``find_unstable``: what a model keeps in float32 when it runs in float16; found, and kept."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastgen.errors import FastgenError
from fastgen.hf import found
from fastgen.hf.weights import tensors_of
from fastgen.ops import names
from fastgen.ops.reference import LARGEST
from fastgen.precision.passes import Batch, Part, Passes, random_batches
from fastgen.precision.search import Answer, Search, distance

BOUND = 0.01
HEADROOM = 4.0


@dataclass(frozen=True)
class Kept:
    """An operation that is kept in float32."""

    name: str
    """The path of the module whose weight it reads; what has none, and a norm's sum, is named after
    a module, with its kind behind a colon."""
    kind: str
    largest: float
    """Magnitude of its results."""
    loss: float
    """Relative error of its float16 results, of the worst row; infinite where they overflow."""
    reason: str


@dataclass(frozen=True)
class Errors:
    """Relative errors of what the model gives, against float32."""

    naive: float
    """Everything in float16; infinite where it overflows."""
    rules: float
    """By the rules that hold for a model for which nothing was found."""
    found: float
    """By what was found."""


@dataclass(frozen=True)
class Precision:
    """What ``find_unstable`` found."""

    kept: tuple[Kept, ...]
    operations: int
    """How many there are."""
    casts: int
    """Casts of values between the two dtypes, in all graphs together."""
    errors: Errors
    problems: tuple[str, ...]
    """What float32 cannot mend: such a model belongs in bfloat16 or float32."""
    wide: tuple[str, ...]
    """``Target.wide`` of the whole model, by paths in it."""


def find_unstable(
    model: Any,
    inputs: Batch | Iterable[Batch] | None = None,
    *,
    bound: float = BOUND,
    headroom: float = HEADROOM,
) -> Precision:
    """Find what a model must compute in float32 when it runs in float16, and remember it.

    Every operation of the engines' graphs is computed in float32 and as float16 graphs do, of
    random token ids and of ``inputs``. From then on a model of these weights keeps what was found
    in float32 when it runs in float16, in this process and, by the engine cache, in others.

    Args:
        model: of a Fast class, in any dtype, on any device.
        inputs: batches as its ``forward`` takes them (``input_ids`` int64 [B, S] and so on); None:
            random ones alone. Where ``decoder_input_ids`` and ``labels`` are missing, a decoder
            reads tokens that it decodes itself.
        bound: the relative error that an operation's float16 results may have.
        headroom: how many times larger values may get, with other inputs, before they overflow.

    Raises:
        FastgenError: no Fast class, a weight that float16 does not hold, a batch without tokens,
            a bound that is not between 0 and 1, or a headroom below 1.
    """
    if not 0 < bound < 1 or not headroom >= 1:
        raise FastgenError(
            f"bound={bound}, headroom={headroom}: allowed are bounds between 0 and 1, such as "
            f"{BOUND}, and a headroom of at least 1, such as {HEADROOM}."
        )
    given = [inputs] if isinstance(inputs, Mapping) else [*(inputs or ())]
    passes = Passes(model, [*random_batches(model.config), *given])
    _refuse_weights(model)
    answer = Search(passes, bound, headroom).answer()
    for part in passes.parts:
        found.remember(part.module, part.local(_of_part(part, passes, answer)))
    model.invalidate_engine()
    kept = (f for f in answer.found.values() if f.name in answer.wide)
    return Precision(
        tuple(Kept(f.name, f.kind, f.largest, f.first_loss or 0.0, f.reason) for f in kept),
        len(answer.found),
        answer.casts,
        _errors(passes, answer.wide),
        answer.problems,
        tuple(sorted(answer.wide)),
    )


def _refuse_weights(model: Any) -> None:
    for name, weight in tensors_of(model).items():
        if float(weight.detach().abs().amax()) > LARGEST:
            raise FastgenError(f"{name} exceeds float16: load the model in bfloat16 or float32.")


def _of_part(part: Part, passes: Passes, answer: Answer) -> Iterator[str]:
    """The chosen operations of a part's graphs: a stack's are those of the whole model, too."""
    encodes = passes.encoder is not None and part.path == passes.encoder.path
    for name in answer.wide:
        path = answer.found[names.operation(name)].path
        if encodes == (passes.encoder is not None and path == passes.encoder.path):
            yield name


def _errors(passes: Passes, wide: frozenset[str]) -> Errors:
    exact = [*passes.run(None)]

    def error(chosen: Iterable[str] | None, clamped: bool = True) -> float:
        return distance(passes.run(chosen, rounded=True, clamped=clamped), exact)

    return Errors(error((), clamped=False), error(None), error(wide))
