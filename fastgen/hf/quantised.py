"""What engines read of a model: its parameters, and what is made of them in fewer bits, once."""

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fastgen import int8
from fastgen.blockwise import Blocks, Format, parse, quantise
from fastgen.engines import NoEngine
from fastgen.hf.let_go import Gone, let_go
from fastgen.hf.mapped import give_back
from fastgen.hf.weights import Fingerprint

Key = tuple[str, Format]
"""A parameter's name, and what was made of it."""


@dataclass(frozen=True, eq=False)
class Made:
    """Blocks, and what their parameter held when they were made."""

    blocks: Blocks | None
    """None: an engine has them in a layout of its own."""
    source: Fingerprint
    place: int
    version: int

    @classmethod
    def now(cls, parameter: torch.Tensor, make: Callable[[], Blocks]) -> "Made":
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
    """A module's tensors by name; and by the names of ``blockwise.Format``, the values and scales
    made of them, the first time that somebody asks.

    Whoever asks shares them, with the engines of other parts of the model too, for as long as
    somebody holds what was ``made``.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        made: dict[Key, Made],
        tables: Collection[int] | None = None,
    ) -> None:
        """
        Args:
            made: is added to.
            tables: ids of tensors that are looked up, and stay for that where others are let go;
                None lets none go.
        """
        self._tensors, self.made, self._tables = tensors, made, tables
        self._rounded: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        if (source := int8.source(name)) is not None:
            self._rounded.add(source)
            return int8.made(name, self._tensors[source])
        if (found := parse(name)) is None:
            return self._tensors[name]
        parameter, form, which = found
        blocks = self._blocks(parameter, form)
        return (blocks.values, blocks.scales)[which]

    def __iter__(self) -> Iterator[str]:
        """The names of parameters as they are."""
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def rounded(self) -> list[torch.Tensor]:
        """The parameters that somebody asked for as integers with a step for each row."""
        return [self._tensors[name] for name in sorted(self._rounded)]

    def unmade(self, names: Iterable[str]) -> list[Key]:
        """Of what these names stand for, what somebody would have to make."""
        found = dict.fromkeys((name, form) for name, form, _ in filter(None, map(parse, names)))
        return [key for key in found if key not in self.made or self.made[key].blocks is None]

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
        found = {name: parse(name) for name in names if int8.source(name) is None}
        parts = [(self._tensors[made[0] if made else name], made) for name, made in found.items()]
        return [parameter for parameter, made in parts if not (made and self._goes(parameter))]

    def let_go(self) -> None:
        """Let torch's weights go of which something was made, but for tables: what was made is then
        the one form there is of them."""
        places = []
        for (name, form), made in self.made.items():
            parameter = self._tensors[name]
            if self._goes(parameter) and not isinstance(parameter, Gone):
                self.made[name, form] = replace(made, source=Fingerprint([]))
                places.append((parameter.data_ptr(), parameter.nbytes))
                others = _all_made.pop(parameter, None)  # nobody may refer to it meanwhile
                let_go(parameter, name)
                if others is not None:
                    others[form] = self.made[name, form]
                    _all_made[parameter] = others
        if places:
            give_back(places)  # what stays of the same file keeps all of it mapped

    def _goes(self, parameter: torch.Tensor) -> bool:
        return self._tables is not None and id(parameter) not in self._tables

    def _blocks(self, parameter: str, form: Format) -> Blocks:
        made = self.made.get((parameter, form))
        if made is None or made.blocks is None:
            made = self.made[parameter, form] = _made(self._tensors[parameter], parameter, form)
        assert made.blocks is not None
        return made.blocks


_all_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> Format -> what was made of it, while somebody holds that."""


def _kept(parameter: torch.Tensor) -> "weakref.WeakValueDictionary[Format, Made]":
    kept: weakref.WeakValueDictionary[Format, Made]
    kept = _all_made.setdefault(parameter, weakref.WeakValueDictionary())
    return kept


def _made(parameter: torch.Tensor, name: str, form: Format) -> Made:
    kept = _kept(parameter)
    made: Made | None = kept.get(form)
    if isinstance(parameter, Gone):
        if made is None or made.blocks is None:
            parameter.refuse()
    elif made is None or not made.of_now(parameter):
        made = kept[form] = Made.now(parameter, lambda: blocks_of(parameter, name, form))
    return made


def blocks_of(parameter: torch.Tensor, name: str, form: Format) -> Blocks:
    """A parameter in fewer bits.

    Raises:
        NoEngine: it has no such form.
    """
    weight = parameter.detach()
    try:
        return quantise(weight.T if form.transposed else weight, form.kind, form.group)
    except ValueError as error:
        raise NoEngine(f"{name}: {error}") from error


def _version(parameter: torch.Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
