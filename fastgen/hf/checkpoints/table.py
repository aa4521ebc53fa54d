"""The libraries that are known, and what a model has of theirs."""

from collections.abc import Callable, Collection
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


Known = list[tuple[str, torch.nn.Module, Held | str]]
"""What the readers say of a model's modules, with their names."""


def known_in(root: torch.nn.Module) -> Known:
    """What is known of the modules of a model, each by the first reader that knows it."""
    modules = root.named_modules(remove_duplicate=False)
    read = ((name, module, _read(module)) for name, module in modules)
    return [(name, module, found) for name, module, found in read if found is not None]


def _read(module: torch.nn.Module) -> Held | str | None:
    return next((found for read in READERS if (found := read(module)) is not None), None)


def weights_in(known: Known) -> dict[str, Held]:
    """The weights in fewer bits that engines may read, by their names in stock modules."""
    return {f"{name}.weight": found for name, _, found in known if isinstance(found, Held)}


def refusal(known: Known) -> Standing | None:
    """Why only torch runs a model: a part has weights in a form that engines do not read."""
    for name, module, found in known:
        if isinstance(found, str):
            return Standing(f"{found} ({name})", module, _as_now(module))
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
