"""Whether a module's weights are still those that its engines were built for."""

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from operator import contains, is_, itemgetter
from typing import Any

import torch

from fastgen.engines import NoEngine

# transformers leaves these on a model once output_attentions was asked for; they only listen
_RECORDING_HOOKS = "transformers.utils.output_capturing"

# A new head or resized embeddings start in training mode, where these compute the same
_SAME_IN_TRAINING = (
    *(torch.nn.Linear, torch.nn.Embedding),
    *(torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential),
)

_LOOKED_AT = itemgetter(
    "training", "_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks"
)


class Glance:
    """What a module looks like; tells in a microsecond a layer's part that nothing has changed.

    It looks at all that ``weights_state`` does, but at whole lists instead of module by module.
    """

    def __init__(self, root: torch.nn.Module, versions: bool) -> None:
        """``root`` itself is not kept: it keeps its Glance. See ``weights_state``."""
        self.descendants = [*_walk(root)][1:]
        self._attributes = [*map(vars, self.descendants)]
        self._versions = versions
        self._objects, self._values = self._look(root)

    def same(self, root: torch.nn.Module) -> bool:
        """Whether everything is as it was when the Glance was made."""
        objects, values = self._look(root)
        # identities, as comparing two tensors gives a tensor; the lengths are among the values
        return values == self._values and all(map(is_, objects, self._objects))

    def _look(self, root: torch.nn.Module) -> tuple[list[Any], list[Any]]:
        attributes = [vars(root), *self._attributes]
        training, children, parameters, *hooks = zip(*map(_LOOKED_AT, attributes), strict=True)
        tensors = [p for p in _entries(parameters) if p is not None]
        objects = [*_entries(children), *_entries(parameters), *_entries(chain(*hooks))]
        values = [
            len(objects),
            training,
            *([*map(len, tables)] for tables in (children, parameters)),
            [type(root), *map(type, self.descendants)],
            [*map(contains, attributes, repeat("forward"))],
            [tensor.data_ptr() for tensor in tensors],
            [tensor.shape for tensor in tensors],
            [tensor.stride() for tensor in tensors],
        ]
        if self._versions:
            values.append([t._version for t in tensors if not t.is_inference()])
        return objects, values


def _entries(tables: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, filter(None, tables)))


def weights_state(root: torch.nn.Module, versions: bool, own: type) -> tuple[Any, ...]:
    """Types of all modules, place and layout of all parameters, in a fixed order.

    Args:
        versions: adds how often each parameter was edited in place, for engines that copy them.
        own: class of the modules that may replace a forward.

    Raises:
        NoEngine: a module does what only torch can do; the message says what.
    """
    state: list[Any] = []
    for module in _walk(root):
        if module._forward_hooks or module._forward_pre_hooks:
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if any(getattr(hook, "__module__", "") != _RECORDING_HOOKS for hook in hooks):
                raise NoEngine("a module has forward hooks, which only torch runs")
        if "forward" in module.__dict__ and not isinstance(module, own):
            raise NoEngine(f"the forward of a {type(module).__name__} was replaced")
        if module.training and not isinstance(module, _SAME_IN_TRAINING):
            raise NoEngine(f"a {type(module).__name__} is in training mode: call model.eval()")
        state.append(type(module))
        for parameter in module._parameters.values():
            if parameter is not None:
                state += (parameter.data_ptr(), parameter.shape, parameter.stride())
                if versions and not parameter.is_inference():
                    state.append(parameter._version)
    return tuple(state)


def _walk(root: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Like ``root.modules()``, several times faster."""
    stack = [root]
    while stack:
        module = stack.pop()
        yield module
        stack.extend(child for child in module._modules.values() if child is not None)
