"""The stock class of transformers that a Fast class stands for."""

from typing import Any

from transformers import PreTrainedModel

from fastgen.explain import Explained


def stock_class(fast: type) -> Any:
    """The Hugging Face class that a Fast class stands for."""
    return next(filter(_is_stock, fast.__mro__))


def stands_in(fast: type) -> bool:
    """Whether a class takes the place of a stock one, which a program's subclass of it does not."""
    return any(map(_is_stock, fast.__bases__))


def _is_stock(base: type) -> bool:
    return issubclass(base, PreTrainedModel) and not issubclass(base, Explained)


def is_ours(fast: type) -> bool:
    """Whether fastgen defines a class; a program's own subclass is known by its own name."""
    return fast.__module__.partition(".")[0] == "fastgen"
