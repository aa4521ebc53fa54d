"""Whether a module's weights are still those that its engines were built for."""

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from operator import call, contains, itemgetter
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as modules
from transformers import PreTrainedModel

from fastgen.file_pages import FilePages, unwritten
from fastgen.hf.standing import Standing

# transformers leaves these on a model once output_attentions was asked for; they only listen
_RECORDING_HOOKS = "transformers.utils.output_capturing"

# gradient_checkpointing_enable() leaves this one on the embeddings: it asks for gradients of their
# output, which no call without gradients computes
INPUT_GRADIENT_HOOK = ("transformers.modeling_utils", "make_inputs_require_grads")

# A new head or resized embeddings start in training mode, where these compute the same
_SAME_IN_TRAINING = (
    *(torch.nn.Linear, torch.nn.Embedding),
    *(torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential),
)

# The modules of torch.ao.quantization, whose Linear is no torch.nn.Linear
_QUANTISED = "torch.ao.nn."

_NOT_COMPUTED = ("training", "gradient_checkpointing", "dropout", "dropout_rate")

# What a forward may compute with, besides weights
_PLAIN = (bool, int, float, str)

# Parts of torch whose numbers are the sizes of their weights, or count in training only
_ONLY_WEIGHTS = (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.dropout._DropoutNd)


def tensors_of(root: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a graph may read, by name: parameters, and the buffers that are computed with."""
    found: dict[str, torch.Tensor] = dict(root.named_parameters(remove_duplicate=False))
    for path, module in root.named_modules(remove_duplicate=False):
        for name in _computed_with(module):
            found[f"{path}.{name}" if path else name] = module._buffers[name]
    return found


_CHILDREN, _PARAMETERS = itemgetter("_modules"), itemgetter("_parameters")
_HOOKS = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")
_TRAINING = itemgetter("training")
_SHAPE, _STRIDE = torch.Tensor.size, torch.Tensor.stride


class Glance:
    """What a module looks like; tells in half a microsecond a part that nothing has changed.

    It looks at all that ``weights_state`` does, but at whole lists instead of module by module, by
    functions that are written in C. No weight is read: its memory may have moved since.
    """

    def __init__(self, root: torch.nn.Module, versions: bool) -> None:
        """``root`` itself is not kept: it keeps its Glance. See ``weights_state``."""
        self.descendants = [*_walk(root)][1:]
        self._attributes = [*map(vars, self.descendants)]
        modules = [root, *self.descendants]
        plain = [(_plain_getter(module), vars(module)) for module in self.descendants]
        plain = [(getter, attributes) for getter, attributes in plain if getter is not None]
        self._root_plain = _plain_getter(root)
        self._getters: list[Any] = [getter for getter, _ in plain]
        self._plain = [attributes for _, attributes in plain]
        self._buffers: list[tuple[dict[str, Any], str]] = [
            (m._buffers, name) for m in modules for name in _computed_with(m)
        ]
        self._held = [table[name] for table, name in self._buffers]
        self._tensors = [*root.parameters(), *self._held]
        self._versioned = [t for t in self._tensors if versions and not t.is_inference()]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self.dtype: Any = getattr(root, "dtype", None)  # as transformers has it
        tables = [(i, module._parameters) for i, module in enumerate(modules)]
        self._single = [  # two of one number may be equal; of more, to ask raises an error
            (i, name, parameter)
            for i, table in tables
            for name, parameter in table.items()
            if parameter is not None and parameter.numel() <= 1
        ]
        children, parameters = (
            [dict(get(vars(module))) for module in modules] for get in (_CHILDREN, _PARAMETERS)
        )
        self._modules = self._look_at_modules(root)[:-2], children, parameters
        self._layout = self._look_at_tensors(root)

    def same(self, root: torch.nn.Module) -> bool:
        """Whether everything is as it was when the Glance was made."""
        try:
            *found, children, parameters = self._look_at_modules(root)
            # what is the same object is equal, whatever it is: modules and parameters are no other
            return (
                (found, children, parameters) == self._modules
                and all(parameters[i][name] is kept for i, name, kept in self._single)
                and all(
                    table[name] is t
                    for (table, name), t in zip(self._buffers, self._held, strict=True)
                )
                and self._look_at_tensors(root) == self._layout
            )
        except (KeyError, RuntimeError):  # an attribute is gone, or a parameter is another
            return False

    def in_place(self) -> bool:
        """Whether the parameters' memory is where it was: of all things the one that engines must
        know of before each of their runs."""
        return [tensor.data_ptr() for tensor in self._tensors] == self._places

    def _look_at_modules(self, root: torch.nn.Module) -> list[Any]:
        """All but tensors; last the tables of children and of parameters themselves."""
        attributes = [vars(root), *self._attributes]
        children = [*map(_CHILDREN, attributes)]
        return [
            [*map(_TRAINING, attributes)],
            [*map(contains, attributes, repeat("forward"))],
            [type(root), *map(type, self.descendants)],
            [*_entries(chain.from_iterable(map(get, attributes) for get in _HOOKS))],
            [*chain.from_iterable(children)],  # their order
            [*map(call, self._getters, self._plain)],
            None if self._root_plain is None else self._root_plain(vars(root)),
            *(_config_fields(root), _global_hooks()),
            children,
            [*map(_PARAMETERS, attributes)],
        ]

    def _look_at_tensors(self, root: torch.nn.Module) -> tuple[Any, ...]:
        """Where they are, and how they lie there: contiguous ones as their shapes say."""
        tensors = self._tensors
        regular = all(map(torch.Tensor.is_contiguous, tensors))
        return (
            [tensor.data_ptr() for tensor in tensors],
            [*map(_SHAPE, tensors)],
            None if regular else [*map(_STRIDE, tensors)],
            [tensor._version for tensor in self._versioned],
        )


_PIECE = 1 << 20  # bytes: small enough that the second sum finds a core's cache filled
_WORTH_A_THREAD = 8 << 20  # bytes, of which one thread sums in a millisecond what starts ten


class Fingerprint:
    """What matrices held when it was made, as sums of their bits along both axes.

    It tells of edits that torch keeps no count of, for as long as a pass over the memory takes.
    """

    def __init__(self, matrices: Iterable[torch.Tensor], threads: int = 1) -> None:
        """``matrices`` (or vectors) are on the CPU; ``threads`` look at them, at most."""
        unique = {matrix.data_ptr(): matrix.detach() for matrix in matrices}
        pieces = [piece for matrix in unique.values() for piece in _pieces(matrix)]
        size = sum(piece.nbytes for piece in pieces)
        count = max(1, min(threads, size // _WORTH_A_THREAD))
        self.places = {(matrix.data_ptr(), matrix.nbytes) for matrix in unique.values()}
        """Where they begin, and their bytes."""
        self._shares = [pieces[first::count] for first in range(count)]
        self._sums = self._look()

    def same(self) -> bool:
        """Whether the matrices, which must be where they were, still hold the same."""
        found = self._look()
        return len(found) == len(self._sums) and all(map(np.array_equal, found, self._sums))

    def _look(self) -> list[np.ndarray]:
        # NumPy: after torch's parallel sums its threads would spin where the engine's are to run
        sums: list[list[np.ndarray]] = [[] for _ in self._shares]

        def look(index: int) -> None:
            for bits in self._shares[index]:
                sums[index] += [np.add.reduce(bits, axis, dtype=bits.dtype) for axis in (0, 1)]

        helpers = []
        for index in range(1, len(self._shares)):
            helper = threading.Thread(target=look, args=(index,))
            try:
                helper.start()
            except RuntimeError:  # there are too many, or the interpreter ends
                look(index)
            else:
                helpers.append(helper)
        look(0)
        for helper in helpers:
            helper.join()
        return [*chain(*sums)]


def watched(matrices: Iterable[torch.Tensor], threads: int) -> list[FilePages | Fingerprint]:
    """What tells of edits of matrices (see ``Fingerprint``): the kernel, where it knows."""
    matrices = [matrix.detach() for matrix in matrices]
    from_file = unwritten(matrices)
    known = {matrix.data_ptr() for matrix in from_file}
    others = [matrix for matrix in matrices if matrix.data_ptr() not in known]
    found: list[FilePages | Fingerprint] = []
    if from_file:
        found.append(FilePages(from_file))
    if others:
        found.append(Fingerprint(others, threads))
    return found


def _pieces(matrix: torch.Tensor) -> list[np.ndarray]:
    """A matrix's bits in groups of rows."""
    rows = matrix if matrix.ndim > 1 else matrix.reshape(1, -1)
    if rows.element_size() == 2:
        rows = rows.view(torch.int16)  # NumPy knows no bfloat16
    width = rows.shape[-1] * rows.element_size()
    kind = next(kind for kind in (np.int64, np.int32, np.int16) if not width % kind().itemsize)
    bits = rows.numpy().view(kind)
    count = max(1, _PIECE // max(1, bits[:1].nbytes))
    return [bits[first : first + count] for first in range(0, len(bits), count)]


def _computed_with(module: torch.nn.Module) -> list[str]:
    """Names of the buffers that a graph may compute with: what a checkpoint holds, but for whole
    numbers, which are positions and masks."""
    buffers = module._buffers.items() if module._buffers else ()
    passing = module._non_persistent_buffers_set
    return [n for n, b in buffers if b is not None and b.is_floating_point() and n not in passing]


def _plain_getter(module: torch.nn.Module) -> Callable[[dict[str, Any]], tuple[Any, ...]] | None:
    """What takes from a module's attributes those that a forward may compute with."""
    names = _plain_attributes(module)
    return itemgetter("training", *names) if names else None  # of one name it gives no tuple


def _plain_attributes(module: torch.nn.Module) -> list[str]:
    if isinstance(module, _ONLY_WEIGHTS):
        return []
    attributes = vars(module)
    names: Iterable[str] = attributes
    if isinstance(module, PreTrainedModel):  # on which programs put attributes of their own
        names = [name for name in _stock_attributes.get(type(module), ()) if name in attributes]
    return [
        name
        for name in names
        if type(attributes[name]) in _PLAIN
        and not name.startswith("_")
        and name not in _NOT_COMPUTED
    ]


_stock_attributes: dict[type, list[str]] = {}
"""Numbers that Hugging Face's own class gives its models, by class; known with the first engine."""


def _global_hooks() -> int:
    return len(modules._global_forward_hooks) + len(modules._global_forward_pre_hooks)


def _config_fields(root: torch.nn.Module) -> list[tuple[str, Any]]:
    """What a config says of the computation, in as far as it may be compared."""
    config = getattr(root, "config", None)
    return [] if config is None else [(n, _frozen(v)) for n, v in vars(config).items()]


def _frozen(value: Any) -> Any:
    """A config's value as it is now; of what is no plain data, its type."""
    if type(value) in _PLAIN or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_frozen(item) for item in value]
    if isinstance(value, dict):
        return [(key, _frozen(item)) for key, item in value.items() if type(key) in _PLAIN]
    return type(value)


def changed_part(
    module: torch.nn.Module, twin: torch.nn.Module, ignore: tuple[str, ...]
) -> str | None:
    """What about the parts of ``module`` is not as in ``twin``, which its config alone made."""
    twins = dict(twin.named_modules())
    for name, part in module.named_modules():
        other = twins.get(name)
        if other is None or (name and f"{name}.".startswith(ignore)):
            continue
        if name and not isinstance(part, type(other)):
            kinds = [type(part), type(other)]
            same = kinds[0].__name__ == kinds[1].__name__
            found, made = (f"{k.__module__}." * same + k.__name__ for k in kinds)
            return f"{name} is a {found}, not a {made}"
        if getattr(part, "max_norm", None) is not None:
            return f"{name} has a max_norm: it edits its weights while it runs"
        if isinstance(other, PreTrainedModel):
            numbers = [
                key for key, value in vars(other).items() if type(value) in (int, float, bool)
            ]
            _stock_attributes[type(other)] = _stock_attributes[type(part)] = numbers
        for field in _plain_attributes(other):
            value, found = vars(other)[field], vars(part).get(field)
            if found != value:
                where = f"{name}.{field}" if name else field
                return f"{where}={found}, where the config makes it {value}"
    return None


def _entries(tables: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, filter(None, tables)))


def weights_state(
    root: torch.nn.Module, versions: bool, own: type | tuple[type, ...]
) -> tuple[Any, ...]:
    """Types of all modules, place and layout of all parameters, in a fixed order.

    Args:
        versions: adds how often each parameter was edited in place, for engines that copy them.
        own: classes of the modules that may replace a forward.

    Raises:
        NoEngine: a module does what only torch can do; the message says what.
    """
    state: list[Any] = []
    if _global_hooks():
        reason = "torch has hooks for the forward of all modules, which only torch runs: remove"
        raise Standing(f"{reason} them", root, lambda _: bool(_global_hooks()))
    for module in _walk(root):
        kind = type(module)
        if (module._forward_hooks or module._forward_pre_hooks) and _has_hooks(module):
            reason = "a module has forward hooks, which only torch runs: remove them"
            raise Standing(f"{reason} (of a {kind.__name__})", module, _has_hooks)
        if "forward" in module.__dict__ and not isinstance(module, own):
            reason = f"the forward of a {kind.__name__} was replaced, which only torch runs"
            raise Standing(reason, module, lambda part: "forward" in part.__dict__)
        if kind.__module__.startswith(_QUANTISED):
            reason = "weights are quantised by torch.ao.quantization (quantize_dynamic, say)"
            raise Standing(f"{reason}, which only torch runs: leave that out", module, _is_a(kind))
        if module.training and not isinstance(module, _SAME_IN_TRAINING):
            part = "the model" if module is root else f"a {kind.__name__}"
            reason = f"{part} is in training mode: call model.eval()"
            raise Standing(reason, module, lambda part: part.training)
        state.append(type(module))
        state += [(name, vars(module)[name]) for name in _plain_attributes(module)]
        buffers = [module._buffers[name] for name in _computed_with(module)]
        for parameter in (*module._parameters.values(), *buffers):
            if parameter is not None:
                state += (parameter.data_ptr(), parameter.shape, parameter.stride())
                if versions and not parameter.is_inference():
                    state.append(parameter._version)
    return (*state, *_config_fields(root))


def _has_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has hooks that may change what it computes."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        home, name = (getattr(hook, key, "") for key in ("__module__", "__name__"))
        if home != _RECORDING_HOOKS and (home, name) != INPUT_GRADIENT_HOOK:
            return True
    return False


def _is_a(kind: type) -> Callable[[torch.nn.Module], bool]:
    return lambda part: type(part) is kind


def refuse_adapters(root: torch.nn.Module, others: tuple[str, ...] = ()) -> None:
    """Adapters of PEFT's kind compute beside the weights until they are merged into them.

    Raises:
        NoEngine: there is one, outside of the parts whose names begin with ``others``.
    """
    for name, part in root.named_modules():
        kind = type(part)
        if "base_layer" in part._modules and not name.startswith(others or ("\0",)):
            where = f"{name} is a {kind.__module__}.{kind.__name__}"
            raise Standing(
                f"an adapter (LoRA, say) is not merged into the weights ({where}): call "
                "merge_and_unload() of its PeftModel",
                part,
                _is_a(kind),
            )


def asks_for_gradients(root: torch.nn.Module) -> bool:
    """Whether a call with gradients enabled may be asked for some; by far quicker than
    ``root.parameters()`` where all are frozen."""
    for module in _walk(root):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                return True
        if module._forward_hooks and isinstance(module, torch.nn.Embedding):
            return True  # one that asks for gradients of what it returns
    return False


def _walk(root: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Like ``root.modules()``, several times faster."""
    stack = [root]
    while stack:
        module = stack.pop()
        yield module
        stack.extend(child for child in module._modules.values() if child is not None)
