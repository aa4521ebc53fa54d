"""The stock class of transformers that a Fast class stands for."""

from typing import Any

from transformers import PreTrainedModel

from fastgen.explain import Explained


def stock_class(fast: type) -> Any:
    """The Hugging Face class that a Fast class stands for."""
    return next(
        base
        for base in fast.__mro__
        if issubclass(base, PreTrainedModel) and not issubclass(base, Explained)
    )


def is_ours(fast: type) -> bool:
    """Whether fastgen defines a class; a program's own subclass is known by its own name."""
    return fast.__module__.partition(".")[0] == "fastgen"
