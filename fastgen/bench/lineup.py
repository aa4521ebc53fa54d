"""Who takes part in a benchmark of which kind of model."""

from fastgen.bench import encoders, generators
from fastgen.bench.contenders import Contender


def contenders(kind: str) -> dict[str, type[Contender]]:
    """By name, in the order in which reports list them; ``fastgen`` is the one others are peers of.

    Args:
        kind: ``seq2seq``, ``causal`` or ``encoder``.
    """
    return encoders.CONTENDERS if kind == "encoder" else generators.CONTENDERS
