"""What operations over packed rows give before their numbers are needed."""

from dataclasses import dataclass

from fastgen.engines.fused.packed_products import Product
from fastgen.engines.fused.packed_values import Buffer, Term


@dataclass(frozen=True, eq=False)
class Ids:
    """One number a token: a call's, or (None) the token's column in its row."""

    name: str | None


@dataclass(frozen=True, eq=False)
class Embedded:
    """A sum of embeddings."""

    terms: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Activated:
    product: Product
    kind: str
    gate: Product | None = None
    """What it is multiplied by."""


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """A residual stream in float32, as it is after so many additions."""

    buffer: Buffer
    additions: int = 0


class Visible:
    """The bias that hides what a call's mask hides, and nothing else."""


class Total:
    """A sum of which nothing but its norm was computed."""
