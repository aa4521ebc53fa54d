"""All who take part in a benchmark, by the kind of model they run."""

from fastgen.bench import encoders, generators
from fastgen.bench.contender import Contender


def contenders(kind: str) -> dict[str, type[Contender]]:
    """By name, in the order in which reports list them; ``fastgen`` is the one others are peers of.

    Args:
        kind: ``seq2seq``, ``causal`` or ``encoder``.
    """
    return encoders.CONTENDERS if kind == "encoder" else generators.CONTENDERS
