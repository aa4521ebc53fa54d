"""A module's parameters by name, and what is made of them for engines: integers and their steps."""

from collections.abc import Iterator, Mapping

import torch

from fastgen import int8


class WithMade(Mapping[str, torch.Tensor]):
    """Parameters as they are; what is made of one is made when it is first asked for, and kept."""

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], made: dict[str, torch.Tensor]
    ) -> None:
        """``made`` is what there is already, which may be shared."""
        self._parameters, self._made = parameters, made
        self._asked: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        source = int8.source(name)
        if source is None:
            return self._parameters[name]
        self._asked.add(source)
        if name not in self._made:
            self._made[name] = int8.made(name, self._parameters[source])
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def sources(self) -> list[torch.Tensor]:
        """The parameters of which something was asked for that was made of them."""
        return [self._parameters[name] for name in sorted(self._asked)]
