"""The libraries that are known, and what a model has of theirs."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch

from fastgen.engines import NoEngine
from fastgen.hf.checkpoints import bitsandbytes, others, quanto, torchao
from fastgen.hf.checkpoints.held import Held
from fastgen.hf.standing import Standing
from fastgen.target import Target

READERS: tuple[Callable[[torch.nn.Module], Held | str | None], ...] = (
    *(torchao.read, bitsandbytes.read, quanto.read),
    others.read,
)
"""Each says what it knows of a module's weight, or why only torch runs the module."""


def _known(root: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, Held | str]]:
    for name, module in root.named_modules(remove_duplicate=False):
        for read in READERS:
            if (found := read(module)) is not None:
                yield name, module, found
                break


def weights_in(root: torch.nn.Module) -> dict[str, Held]:
    """The weights in fewer bits that engines may read, by their names in stock modules."""
    found = ((name, known) for name, _, known in _known(root))
    return {f"{name}.weight": known for name, known in found if isinstance(known, Held)}


def refusal(root: torch.nn.Module) -> Standing | None:
    """Why only torch runs a model: a part has weights in a form that engines do not read."""
    for name, module, known in _known(root):
        if isinstance(known, str):
            return Standing(f"{known} ({name})", module, _as_now(module))
    return None


def _as_now(module: torch.nn.Module) -> Callable[[torch.nn.Module], bool]:
    kinds = _kinds(module)
    return lambda part: _kinds(part) == kinds


def _kinds(module: torch.nn.Module) -> list[type]:
    return [type(module), *map(type, module._parameters.values())]


def served(target: Target, held: Collection[Held]) -> Target:
    """The Target of a model with such weights.

    Raises:
        NoEngine: it has no products by them, or other ones are asked for.
    """
    if not held:
        return target
    kinds = sorted({weight.kind for weight in held})
    library = next(iter(held)).library
    if target.backend != "onnxruntime":
        raise NoEngine(
            f"{target.backend} is given weights as they are, and {library}'s are {kinds[0]}: take "
            "EngineOptions(backend='onnxruntime')"
        )
    if target.weights not in ("full", *kinds):
        raise NoEngine(
            f"EngineOptions(weights={target.weights!r}), where {library} has made them "
            f"{' and '.join(kinds)}: leave that out, or take weights={kinds[0]!r}"
        )
    rounds = next((weight.rounds for weight in held if weight.rounds), None)
    if rounds and target.weights == "full":
        raise NoEngine(
            f"{library} rounds {rounds}, as no engine does to the same numbers: "
            f"EngineOptions(weights={kinds[0]!r}) serves it by the same weights, with roundings of "
            "its own"
        )
    return replace(target, held=True)
