"""What operations are called, and which of them give float32 where the others give float16.

An operation is named after the parameter that it reads, by its module's path (``a.wo``; a norm's
sum ``a.layer_norm:sum``), or else after the module that its input comes from (``a:activation``).
``Target.wide`` is a choice of such names; ``fastgen.precision`` makes it.
"""

from typing import Any

from fastgen.target import Target

FORMAT = 1
"""Counts changes of what operations are called: answers by other names are not found."""
_KEY = "fastgen.operation"


class Builder:
    """What onnxscript's modules tell which of them is at work, where nothing writes a graph:
    names are those of parameters."""

    def push_module(self, name: str, class_name: str) -> None: ...

    def pop_module(self) -> None: ...


def of(value: Any) -> str:
    """The name of the operation that gave a value; empty for a graph's inputs and the like."""
    return str(value.meta.get(_KEY, ""))


def give(value: Any, name: str) -> Any:
    """The value, which from now on has the name."""
    value.meta[_KEY] = name
    return value


def of_parameter(value: Any) -> str:
    """The path of the module that a parameter is part of."""
    return str(value.name).rpartition(".")[0]


def total(norm: str) -> str:
    """The sum that a norm reads."""
    return f"{norm}:sum"


def activation(x: str) -> str:
    return f"{module(x)}:activation"


def multiply(x: str) -> str:
    return f"{module(x)}:multiply"


def add(x: str, y: str) -> str:
    """Empty where one of both is no operation's result, such as a mask."""
    return f"{module(x)}:add" if x and y else ""


def attention(q: str) -> str:
    return f"{module(q)}:attention"


def product(linear: str) -> str:
    """Says of a linear that it multiplies in float32, too: else its factors are float16."""
    return f"{linear}:product"


def operation(name: str) -> str:
    """The operation that a name of a choice is about."""
    return name.removesuffix(product(""))


def module(name: str) -> str:
    """The module that an operation is part of."""
    path, colon, _ = name.partition(":")
    return path if colon else path.rpartition(".")[0]


class Choice:
    """Which operations a Target wants in float32."""

    def __init__(self, target: Target) -> None:
        wide = target.wide if target.dtype == "float16" else None
        self.made = wide is not None
        """Whether there is a choice; without, each operation has a rule of its own."""
        self._names = frozenset(wide or ())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def wide(self, name: str, rule: bool) -> bool:
        """Whether an operation's result is float32: as chosen, or by the rule."""
        return name in self._names if self.made else rule
