"""What engines read of a model: its parameters, and what is made of them once, in fewer bits or, of
16 bits on a CPU, in float32."""

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fastgen import int8
from fastgen.blockwise import Blocks, Format, parse, quantise
from fastgen.engines import NoEngine
from fastgen.file_pages import FilePages, unwritten
from fastgen.hf.checkpoints.held import Held, Looked
from fastgen.hf.let_go import Gone, let_go
from fastgen.hf.weights import Fingerprint

Key = tuple[str, Format]
"""A parameter's name, and what is made of it."""
AnyKey = tuple[str, Format | None]
"""The same; None is the parameter in float32."""


@dataclass(frozen=True, eq=False)
class Made:
    """What was made of a parameter, and what that held then."""

    blocks: Blocks | torch.Tensor | None
    """None: an engine has them in a layout of its own."""
    source: Fingerprint | Looked
    place: int
    version: int

    @classmethod
    def now(cls, parameter: torch.Tensor, make: Callable[[], Blocks | torch.Tensor]) -> "Made":
        """What is made of what a parameter holds now."""
        weight = parameter.detach()
        source = Fingerprint([weight] if weight.device.type == "cpu" else [])
        place, version = weight.data_ptr(), _version(parameter)
        return cls(make(), source, place, version)

    def of_now(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter still holds that."""
        same = (self.place, self.version) == (parameter.data_ptr(), _version(parameter))
        return same and self.source.same()


class Weights(Mapping[str, torch.Tensor]):
    """A module's tensors by name, as engines compute with them; and by the names of
    ``blockwise.Format``, the values and scales made of them, the first time that somebody asks.

    Whoever asks shares them, with the engines of other parts of the model too, for as long as
    somebody holds what was ``made``.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        made: dict[AnyKey, Made],
        tables: Collection[int] | None = None,
        wide: bool = False,
        held: Mapping[str, Held] = MappingProxyType({}),
        forms: Mapping[str, Format] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            tensors: parameters, but for those that are ``held`` otherwise.
            made: is added to.
            tables: ids of tensors that are looked up, and stay for that where others are let go;
                None lets none go.
            wide: whether all are computed with in float32.
            held: weights that the model has in fewer bits.
            forms: the format in which engines read each of them.
        """
        self._tensors, self.made, self._tables, self._wide = tensors, made, tables, wide
        self.held, self._forms = held, forms
        self._rounded: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        if (source := int8.source(name)) is not None:
            self._rounded.add(source)
            return int8.made(name, self.computed_with(source))
        parameter, form, which = parse(name) or (name, None, 0)
        if form is None and parameter in self.held and not self.held[parameter].whole:
            raise NoEngine(f"{name} is read whole, and the model has it in fewer bits")
        if form is None and not self.widens(name):
            return self._tensors[name]
        found = self._blocks(parameter, form)
        return found if isinstance(found, torch.Tensor) else found.part(which)

    def described(
        self, names: Collection[str]
    ) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, Format]]:
        """dtypes (torch's names) and shapes of parameters; and the formats of those among them that
        the model has in fewer bits.

        Raises:
            NoEngine: there is no such parameter.
        """
        if missing := sorted(set(names) - self._tensors.keys() - self.held.keys()):
            raise NoEngine(f"parameters were replaced: {missing[0]} is gone")
        types = {name: self.type_of(name) for name in names}
        return types, {name: self._forms[name] for name in names if name in self._forms}

    def __iter__(self) -> Iterator[str]:
        """The names of parameters as they are."""
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        """Whether it is the name of a parameter that may be read; nothing is made to find out."""
        return name in self._tensors or (name in self.held and name not in self._forms)

    def __len__(self) -> int:
        return len(self._tensors)

    def values(self) -> ValuesView[torch.Tensor]:
        """The parameters as they are: nothing is made of them."""
        return self._tensors.values()

    def widens(self, name: str) -> bool:
        """Whether engines read another tensor instead of this parameter: its numbers in float32, or
        in full."""
        return name in self.held or (self._wide and self._tensors[name].dtype != torch.float32)

    def type_of(self, name: str) -> tuple[str, tuple[int, ...]]:
        """dtype and shape of a parameter as engines read it, without making anything."""
        if name in self.held:
            return _words(self._dtype()), self.held[name].shape
        tensor = self._tensors[name]
        dtype = torch.float32 if self.widens(name) else tensor.dtype
        return _words(dtype), tuple(tensor.shape)

    def rounded(self) -> list[torch.Tensor]:
        """The parameters that somebody asked for as integers with a step for each row."""
        return [self._tensors[name] for name in sorted(self._rounded)]

    def unmade(self, names: Iterable[str]) -> list[Key]:
        """Of what these names stand for, what somebody would have to make of numbers in full."""
        found = dict.fromkeys((name, form) for name, form, _ in filter(None, map(parse, names)))
        asked = (key for key in found if key[0] not in self.held)
        return [key for key in asked if key not in self.made or self.made[key].blocks is None]

    def give(self, key: Key, blocks: Blocks) -> None:
        """Have blocks that were made of what the parameter holds now."""
        parameter, form = self._tensors[key[0]], key[1]
        made = self.made[key] = Made.now(parameter, lambda: blocks)
        _kept(parameter)[form] = made

    def packed(self, names: Iterable[str]) -> None:
        """Let go of the blocks of these values and scales, which an engine has copied."""
        for parameter, form, _ in filter(None, map(parse, names)):
            self.made[parameter, form] = replace(self.made[parameter, form], blocks=None)

    def sources(self, names: Iterable[str]) -> list[torch.Tensor]:
        """The parameters that these names stand for, or are made of, but for those let go and those
        ``rounded``."""
        found = []
        for name in (name for name in names if int8.source(name) is None):
            parameter = (parse(name) or (name,))[0]
            if parameter in self.held:
                continue
            made = parameter != name or self.widens(name)
            if not (made and self._goes(self._tensors[parameter])):
                found.append(self._tensors[parameter])
        return found

    def looked_at(self, names: Iterable[str]) -> tuple[Looked, ...]:
        """What tells of edits of the weights held in fewer bits that these names stand for."""
        read = {(parse(name) or (name,))[0] for name in names}
        return tuple(Looked(self.held[name]) for name in sorted(read & self.held.keys()))

    def let_go(self) -> None:
        """Let torch's weights go of which something was made, but for tables, and for what engines
        read as a library holds it: what was made is then the one form there is of them."""
        lie = {name for name, form in self.made if name in self.held and form and form.as_held}
        parts = [(self._holder(name), name) for name, _ in self.made if name not in lie]
        going = {id(p): name for p, name in parts if self._goes(p) and not isinstance(p, Gone)}
        for (name, form), made in self.made.items():
            if id(self._holder(name)) in going:
                self.made[name, form] = replace(made, source=Fingerprint([]))
        whole = (self._tensors[name].detach() for name in going.values() if name not in self.held)
        pages = FilePages(unwritten(whole))
        for name in going.values():
            parameter = self._holder(name)
            others = _all_made.pop(parameter, None)  # nobody may refer to it meanwhile
            let_go(parameter, name)
            if others is not None:
                kept = ((n, form) for n, form in self.made if self._holder(n) is parameter)
                others.update({form: self.made[n, form] for n, form in kept})
                _all_made[parameter] = others
        pages.give_back()  # what stays of the same file keeps all of it mapped

    def _holder(self, name: str) -> torch.Tensor:
        """What is let go of a weight."""
        return self.held[name].holder if name in self.held else self._tensors[name]

    def _dtype(self) -> torch.dtype:
        """Of the engines' computation."""
        return torch.float32 if self._wide else next(iter(self._tensors.values())).dtype

    def _goes(self, parameter: torch.Tensor) -> bool:
        return self._tables is not None and id(parameter) not in self._tables

    def parameter(self, name: str) -> torch.Tensor:
        """Torch's own tensor."""
        return self._tensors[name]

    def computed_with(self, name: str) -> torch.Tensor:
        """A parameter's numbers in the dtype that engines compute in; nobody keeps them."""
        weight = self._tensors[name].detach()
        if not self._wide:
            return weight
        with torch.inference_mode(False):
            return weight.float()

    def _blocks(self, name: str, form: Format | None) -> Blocks | torch.Tensor:
        made = self.made.get((name, form))
        if made is None or made.blocks is None:
            made = self.made[name, form] = _made(
                self._holder(name), form, lambda: self._made_now(name, form)
            )
        assert made.blocks is not None
        return made.blocks

    def _made_now(self, name: str, form: Format | None) -> Made:
        if (held := self.held.get(name)) is not None:
            holder, looked, dtype = held.holder, Looked(held), self._dtype()
            blocks = held.numbers(dtype) if form is None else held.blocks(form, dtype)
            return Made(blocks, looked, holder.data_ptr(), _version(holder))

        def make() -> Blocks | torch.Tensor:
            whole = self.computed_with(name)
            return whole if form is None else blocks_of(whole, name, form)

        return Made.now(self._tensors[name], make)


_all_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> Format (or None) -> what was made of it, while somebody holds that."""


def _kept(parameter: torch.Tensor) -> "weakref.WeakValueDictionary[Format | None, Made]":
    kept: weakref.WeakValueDictionary[Format | None, Made]
    kept = _all_made.setdefault(parameter, weakref.WeakValueDictionary())
    return kept


def _made(parameter: torch.Tensor, form: Format | None, now: Callable[[], Made]) -> Made:
    """What there is of a parameter in a format, or what ``now`` makes."""
    kept = _kept(parameter)
    made: Made | None = kept.get(form)
    if isinstance(parameter, Gone):
        if made is None or made.blocks is None:
            parameter.refuse()
    elif made is None or not made.of_now(parameter):
        made = kept[form] = now()
    return made


def blocks_of(weight: torch.Tensor, name: str, form: Format) -> Blocks:
    """A parameter's numbers in fewer bits.

    Raises:
        NoEngine: they have no such form.
    """
    try:
        return quantise(weight.T if form.transposed else weight, form.kind, form.group)
    except ValueError as error:
        raise NoEngine(f"{name}: {error}") from error


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(parameter: torch.Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
