"""Calls of ``generate`` whose like came before, and what stock's Python made of their arguments.

Before its first token stock's ``generate`` spends one to three milliseconds on configs, signatures,
processors and criteria, which follow from plain arguments and the sizes of tensors alone. A call
that the fast loop served, and of which nothing was said, is remembered under all of these; the next
one that is given the same begins where the first had come to.
"""

import copy
import inspect
import logging
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from fastgen.execution.decoder import Decoder
from fastgen.generation.call import Call
from fastgen.hf import contract
from fastgen.hf.stock import is_ours

_KEPT = 16  # calls that a decoder remembers

_PLAIN = (bool, int, float, str, type(None))
_CONFIG = frozenset(vars(GenerationConfig()))

# Stock's methods that a call may come through: a program can have put others in their place
_methods = attrgetter(
    *(name for name, method in vars(GenerationMixin).items() if inspect.isfunction(method)),
    *("forward", "get_encoder"),
)


@dataclass(frozen=True)
class Given:
    """What a call of ``generate`` was given: tensors, and the name of all else."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    config: GenerationConfig | None
    names: tuple[str, ...]
    """Of the other arguments."""
    key: Hashable


class _Frozen:
    """A generation config as it was."""

    def __init__(self, config: GenerationConfig | None) -> None:
        self._fields = None if config is None else copy.deepcopy(vars(config))
        self._types = [*map(type, (self._fields or {}).values())]

    def is_as(self, config: GenerationConfig | None) -> bool:
        """Whether a config is as this one was: plain values tell, and of others their types."""
        if config is None or self._fields is None:
            return config is self._fields
        fields = vars(config)
        return [*map(type, fields.values())] == self._types and bool(fields == self._fields)

    def is_plain(self) -> bool:
        """Whether comparing it tells all."""
        return all(map(_is_plain, (self._fields or {}).values()))


@dataclass
class Known:
    """What ``generate`` came down to."""

    call: Call
    """The first such call, of which nothing is kept that another one brings along."""
    expand: int
    """Rows of the loop for each row that is given."""
    configs: tuple[_Frozen, _Frozen]
    """The model's generation config, and that of the call."""
    methods: tuple[Any, ...]

    def holds(self, model: Any, given: Given) -> bool:
        """Whether stock's Python would come down to the same again."""
        own, of_call = self.configs
        if not (own.is_as(model.generation_config) and of_call.is_as(given.config)):
            return False
        return bool(_methods(type(model)) == self.methods)


def given(model: Any, inputs: Any, kwargs: Mapping[str, Any]) -> Given | None:
    """What ``generate(inputs, **kwargs)`` is given, if calls of its kind are remembered: token ids,
    a mask, and plain values for the generation config."""
    others = dict(kwargs)
    ids, config = others.pop("input_ids", None), others.pop("generation_config", None)
    mask = others.pop("attention_mask", None)
    if (ids is None) == (inputs is None) or not _is_stock(model) or _is_watched():
        return None
    ids = inputs if ids is None else ids
    if type(config) not in (type(None), GenerationConfig) or not others.keys() <= _CONFIG:
        return None
    if not _are_ids(ids, model) or not (mask is None or _is_mask_of(mask, ids)):
        return None
    if not all(map(_is_plain, others.values())):
        return None
    values = tuple((n, type(v), tuple(v) if isinstance(v, list) else v) for n, v in others.items())
    kind = None if mask is None else mask.dtype
    heard = logging.getLogger("transformers").getEffectiveLevel()
    return Given(ids, mask, config, tuple(others), (ids.shape, kind, config is None, values, heard))


def _is_stock(model: Any) -> bool:
    """Whether a model is of a class of ours with no method of its own, in a version that is met."""
    kind: Any = type(model)
    own = vars(model)
    return contract.is_met() and is_ours(kind) and _methods_of(kind).isdisjoint(own)


@cache
def _methods_of(kind: Hashable) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))


def _are_ids(ids: Any, model: Any) -> bool:
    return (
        type(ids) is torch.Tensor
        and ids.ndim == 2
        and ids.dtype == torch.int64
        and ids.device == model.device
        and ids.numel() > 0
    )


def _is_mask_of(mask: Any, ids: torch.Tensor) -> bool:
    return type(mask) is torch.Tensor and mask.shape == ids.shape and mask.device == ids.device


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(type(item) in _PLAIN for item in value)
    return type(value) in _PLAIN


def _is_watched() -> bool:
    """Whether something follows a program's steps that is to see all of them."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cuda")
        or torch.is_autocast_enabled("cpu")
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
    )


class Note(logging.Handler):
    """What a call of stock's ``generate`` came down to, and whether anything was said of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, Call]] = []
        self.heard = False

    def emit(self, record: logging.LogRecord) -> None:
        """Something was said, maybe of this call."""
        self.heard = True


class _Noting(threading.local):
    note: Note | None = None


_noting = _Noting()


@contextmanager
def noting() -> Iterator[Note]:
    """Note what the fast loops serve in the body."""
    note, outer = Note(), _noting.note
    library = logging.getLogger("transformers")
    library.addHandler(note)
    _noting.note = note
    try:
        yield note
    finally:
        _noting.note = outer
        library.removeHandler(note)


def served(model: Any, call: Call) -> None:
    """Say that a fast loop has served a call of a decoding method."""
    if _noting.note is not None:
        _noting.note.found.append((model, call))


def remember(model: Any, given: Given, note: Note) -> None:
    """Remember what ``generate`` came down to, where the next such call must do so too."""
    if note.heard or len(note.found) != 1 or note.found[0][0] is not model:
        return
    _, call = note.found[0]
    rows, more = divmod(len(call.input_ids), len(given.ids))
    configs = _Frozen(model.generation_config), _Frozen(given.config)
    if more or not _follows(model, call, given) or not all(frozen.is_plain() for frozen in configs):
        return
    kept = copy.copy(call)
    kept.hidden = kept.mask = None
    kept.cache = None  # type: ignore[assignment]
    if call.hidden is None:
        kept.input_ids = call.input_ids[:0]
    decoder, known = call.decoder, Known(kept, rows, configs, _methods(type(model)))
    kept.decoder = None  # type: ignore[assignment]  # which keeps it
    with decoder.lock:
        decoder.calls[given.key] = known
        while len(decoder.calls) > _KEPT:
            del decoder.calls[next(iter(decoder.calls))]


def _follows(model: Any, call: Call, given: Given) -> bool:
    """Whether a call follows from sizes and plain values, and stock warns of nothing in it."""
    config, prompt = call.config, call.prompt
    if call.waits or not call.plain or call.plan().obstacle is not None:
        return False
    lengths = [
        getattr(each, "max_length", None) for each in (model.generation_config, given.config)
    ]
    asked = config.max_new_tokens is not None or "max_length" in given.names
    asked = asked or any(length is not None for length in lengths)
    least = max(config.min_length or 0, prompt + (config.min_new_tokens or 0))
    if not asked or least > config.max_length:
        return False
    if call.hidden is not None:
        return prompt == 1 and (call.mask is None) == (given.mask is None)
    if given.mask is not None:
        return bool((given.mask == 1).all())
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return len(given.ids) == 1 and (config.pad_token_id is None or config.pad_token_id in ends)


def found(model: Any, decoder: Decoder, given: Given) -> Known | None:
    """What ``generate`` comes down to, if a call like this one is known."""
    known: Known | None = decoder.calls.get(given.key)
    return known if known is not None and known.holds(model, given) else None


def again(model: Any, decoder: Decoder, given: Given, known: Known) -> Call | None:
    """The call that ``generate`` comes down to, after its encoder; None if it has to be asked."""
    ids, hidden, mask, rows = given.ids, None, given.mask, known.expand
    if decoder.shape.source:
        hidden = model._encoded(ids, mask, known.call.config)
        if hidden.shape != (*ids.shape, decoder.shape.width):
            return None
        ids = known.call.input_ids
    elif mask is not None:
        if not bool((mask == 1).all()):
            return None
        mask = None
    if rows > 1:
        ids = ids if decoder.shape.source else ids.repeat_interleave(rows, dim=0)
        hidden = None if hidden is None else hidden.repeat_interleave(rows, dim=0)
        mask = None if mask is None else mask.repeat_interleave(rows, dim=0)
    # of a source the encoder has looked at what may differ from call to call
    if hidden is None and model.refusal(**{model._reads: ids}) is not None:
        return None
    call = copy.copy(known.call)
    call.decoder, call.input_ids, call.hidden, call.mask = decoder, ids, hidden, mask
    call.cache = model._new_cache()
    return call
