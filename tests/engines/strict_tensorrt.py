"""A module with exactly the names and arguments of real TensorRT bindings, over a simulation.

What the bindings of one version do not have, or do not take, is refused as they would refuse it:
attributes, arguments by name, number and kind, members of enums, and methods of callbacks.
"""

import inspect
import json
import re
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from types import ModuleType
from typing import Any

from tests.engines.tensorrt_signatures import FOLDER, split

#: All that fastgen is written against, the oldest and the newest of each library.
VERSIONS = sorted(path.stem for path in FOLDER.glob("*.json"))
CALLBACKS = ("ILogger", "IProgressMonitor")  # classes that fastgen derives from
_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "float": (float, int),
    "Buffer": (bytes, bytearray, memoryview),
    "tuple": (tuple,),
    "list": (list,),
}


class Module:
    """What ``import tensorrt`` gives in one version, e.g. "tensorrt-10.15.1.29"."""

    def __init__(self, name: str, simulation: ModuleType) -> None:
        found = json.loads((FOLDER / f"{name}.json").read_text())
        self.__version__: str = found["version"]
        self._simulation, self._classes = simulation, found["classes"]
        for enum, members in found["enums"].items():
            setattr(self, enum, IntEnum(enum, {m: i for i, m in enumerate(members)}))
        for kind in sorted(self._classes, key=lambda kind: len(self._classes[kind]["bases"])):
            setattr(self, kind, self._make(kind))

    def _make(self, name: str) -> type:
        bases, members = self._classes[name]["bases"], self._classes[name]["members"]
        if name in CALLBACKS:
            return _callback(name, members)
        base = getattr(self, bases[0]) if bases else Strict
        return type(name, (base,), {"_trt": self, "_members": members})

    def accepts(self, value: Any, kind: str) -> bool:
        """Whether a parameter of this kind takes the value."""
        if kind in _PLAIN:
            if kind == "Buffer" and type(value).__name__ == "IHostMemory":
                return True
            return isinstance(value, _PLAIN[kind]) and (kind == "bool" or type(value) is not bool)
        if kind == "Dims":
            return isinstance(value, tuple | list) and all(type(size) is int for size in value)
        assert hasattr(self, kind), f"the strict module has no {kind}: add it to the signatures"
        return isinstance(value, getattr(self, kind))

    def given(self, value: Any, kind: str) -> Any:
        """A result of the simulation as the bindings give it."""
        if kind == "None":
            assert value is None
            return None
        if kind in _PLAIN:
            assert type(value) in _PLAIN[kind], f"the simulation gives {value!r}, not {kind}"
            return value
        if value is None or kind == "Dims" or isinstance(value, Strict):
            return value
        target = getattr(self, kind)
        return target[value] if issubclass(target, IntEnum) else target._wrap(value)


class Strict:
    """An object of the simulation, seen through the members of the real class."""

    _trt: Module
    _members: dict[str, Any]
    _real: Any

    def __init__(self, *arguments: Any, **named: Any) -> None:
        values = _bound(self, "__init__", arguments, named)[0]
        made = getattr(self._trt._simulation, type(self).__name__)(**values)
        object.__setattr__(self, "_real", made)

    @classmethod
    def _wrap(cls, real: Any) -> "Strict":
        self = object.__new__(cls)
        object.__setattr__(self, "_real", real)
        return self

    def __getattr__(self, name: str) -> Any:
        member = self._members.get(name)
        if member is None:
            raise AttributeError(f"{self._trt.__version__}: {type(self).__name__} has no {name}")
        if isinstance(member, dict):
            return self._trt.given(getattr(self._real, name), member["gives"])
        return self._method(name)

    def _method(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            values, gives = _bound(self, name, arguments, named)
            return self._trt.given(getattr(self._real, name)(**values), gives)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            return object.__setattr__(self, name, value)
        member = self._members.get(name)
        if not isinstance(member, dict) or member["takes"] is None:
            raise AttributeError(
                f"{self._trt.__version__}: {type(self).__name__}.{name} is not set"
            )
        if not self._trt.accepts(value, member["takes"]):
            raise TypeError(f"{type(self).__name__}.{name} takes {member['takes']}, not {value!r}")
        return setattr(self._real, name, _plain(value))

    def __bytes__(self) -> bytes:
        assert type(self).__name__ == "IHostMemory", "not a buffer"
        return bytes(self._real)


def _bound(owner: Strict, name: str, arguments: Any, named: Any) -> tuple[dict[str, Any], str]:
    """The arguments by name and the kind of the result, of the first overload that takes them."""
    overloads = owner._members[name]
    for text in overloads:
        signature = _signature(text)
        try:
            values = signature.bind(*arguments, **named).arguments
        except TypeError:
            continue
        kinds = {label: signature.parameters[label].annotation for label in values}
        if all(owner._trt.accepts(value, kinds[label]) for label, value in values.items()):
            plain = {label: _plain(value) for label, value in values.items()}
            return plain, signature.return_annotation
    shown = ", ".join([*map(repr, arguments), *(f"{n}={v!r}" for n, v in named.items())])
    raise TypeError(
        f"{owner._trt.__version__}: {type(owner).__name__}.{name}({shown}): it takes {overloads}"
    )


def _plain(value: Any) -> Any:
    return value._real if isinstance(value, Strict) else value


@cache
def _signature(text: str) -> inspect.Signature:
    """``"(model: Buffer, path: str = ...) -> bool"``; annotations are names of kinds."""
    takes, gives = re.fullmatch(r"\((.*)\) -> (.*)", text).groups()  # type: ignore[union-attr]
    parameters = []
    for argument in split(takes):
        label, kind = argument.removesuffix(" = ...").split(": ")
        default = ... if argument.endswith(" = ...") else inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(
                label, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind
            )
        )
    return inspect.Signature(parameters, return_annotation=gives)


def _callback(name: str, members: dict[str, Any]) -> type:
    """A base class whose heirs must override all methods, with the real ones' arguments."""
    methods = {n: m for n, m in members.items() if isinstance(m, list) and m and n != "__init__"}
    severities = [n for n, m in members.items() if m == "enum member"]
    severity = IntEnum("Severity", {n: i for i, n in enumerate(severities)})

    def check(cls: type, **_: Any) -> None:
        for method, (text,) in methods.items():
            assert method in vars(cls), f"{cls.__name__} lacks {name}.{method}"
            labels = _signature(text).parameters
            inspect.signature(vars(cls)[method]).bind(None, *labels)

    def made(self: Any) -> None:
        self._initialised = True  # pybind refuses heirs that do not call it

    scope = {"__init_subclass__": classmethod(check), "__init__": made, "Severity": severity}
    return type(name, (), scope | {member.name: member for member in severity})
