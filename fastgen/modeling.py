"""The life of an engine inside a Hugging Face module: built lazily, dropped when weights move."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import torch
from onnxscript import nn as graph_nn
from transformers import PreTrainedModel

from fastgen import engines, processes
from fastgen.engine_cache import Artifact, EngineCache
from fastgen.engine_key import engine_key
from fastgen.engines import Engine, NoEngine, choose_target
from fastgen.errors import UnsupportedConfigError
from fastgen.explain import Explained
from fastgen.graphs import graph as graphs
from fastgen.graphs.graph import TensorSpec
from fastgen.hf import trial
from fastgen.options import EngineOptions
from fastgen.standing import Remembered, Standing
from fastgen.target import Target
from fastgen.weights import (
    Fingerprint,
    Glance,
    changed_part,
    refuse_adapters,
    tensors_of,
    weights_state,
)

_QUANTISED = "quantised or sharded, which only torch runs: load the model without that"

_KNOWN_LIBRARIES = ("torch", "transformers", "fastgen")


class _Steady(threading.local):
    """Modules whose weights this thread has just looked at, by id: served, or why not."""

    modules: frozenset[int] = frozenset()
    refused: Mapping[int, str] = MappingProxyType({})


_steady = _Steady()


class EngineModule(Explained, torch.nn.Module):
    """Mixin of a Hugging Face module: keeps its compiled engines and knows when they are stale.

    Subclasses say in ``_build_engine`` what an engine of theirs is.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    _engine: Any = None
    _engine_weights: tuple[Any, ...] | None = None
    _copies: tuple[Fingerprint, ...] = ()
    _glance: Glance | None = None
    _parts: Sequence["EngineModule"] = ()
    _parts_glance: Glance | None = None
    _engine_options: EngineOptions | None = None
    _refusal: str | None = None
    _waits = False
    """Whether its engine is built by its own first call, not with the whole model's."""
    _standing: Remembered | None = None

    @property
    def engine_options(self) -> EngineOptions:
        """Options of this model's engines; assigning drops the engines built so far."""
        if self._engine_options is None:
            self._engine_options = EngineOptions.resolve(None)
        return self._engine_options

    @engine_options.setter
    def engine_options(self, options: EngineOptions | Mapping[str, Any] | None) -> None:
        resolved = EngineOptions.resolve(options)
        for module in self.modules():
            if isinstance(module, EngineModule):
                module._engine_options = resolved
        self.invalidate_engine()

    def invalidate_engine(self) -> None:
        """Drop compiled engines, KV buckets and captured graphs; the next call builds anew.

        No call needs it: moving, casting, loading, resizing and edits are noticed, those through
        ``.data`` too.
        """
        for module in self.modules():
            if isinstance(module, EngineModule):
                module._drop_engine()
                module._engine_weights = module._glance = None

    def forget_engines(self) -> list[Any]:
        """In a forked child: drop engines that cannot run here (see ``processes``)."""
        engine = self._engine
        self._drop_engine()
        self._engine_weights = self._glance = None
        return [] if engine is None else [engine]

    def compile_engine(self) -> None:
        """Build every engine now (and store it in the engine cache), not at the first call.

        Raises:
            NoEngine: no engine serves this model; the message says why.
        """
        for module in self.modules():
            if isinstance(module, EngineModule) and (module is self or not module._waits):
                module._current_engine()

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Look at the weights once, and take them as unchanged until the end of the body."""
        outer = _steady.modules, _steady.refused
        try:
            self._current_engine()
        except NoEngine as error:
            _steady.refused = {**outer[1], id(self): str(error)}
        else:
            glance = self._glance
            if glance is not None and glance is not self._parts_glance:
                parts = [m for m in glance.descendants if isinstance(m, EngineModule)]
                self._parts = [part for part in parts if not part._waits and part._has_engine()]
                self._parts_glance = glance  # until it changes, so do none of the parts
            _steady.modules = outer[0] | {id(self), *map(id, self._parts)}
        try:
            yield
        finally:
            _steady.modules, _steady.refused = outer

    def standing_refusal(self) -> str | None:
        """Why no engine serves the model, where that takes no look at all its weights."""
        reason = _steady.refused.get(id(self))
        standing = self._standing
        if reason is None and standing is not None and standing.holds(self):
            reason = standing.reason
        return reason

    def _has_engine(self) -> bool:
        try:
            self._current_engine()
        except NoEngine:
            return False
        return True

    def _goes_on(self) -> bool:
        """Whether there is an engine, and its weights are where they were: enough for one more
        token of a sequence, with whose first all else was looked at."""
        if self._engine is None or id(self) in _steady.modules:
            return self._engine is not None
        return self._glance is not None and self._glance.in_place()

    def _build_engine(self, target: Target) -> Any:
        raise NotImplementedError

    def _current_engine(self) -> Any:
        """The engine for the weights as they are now.

        Raises:
            NoEngine: torch must serve this model; the message says why.
        """
        engine = self._engine  # another thread may drop it meanwhile
        if id(self) in _steady.modules and engine is not None:
            return engine
        if reason := self.standing_refusal():
            raise NoEngine(reason)
        try:
            engine = self._engine_of_now()
        except Standing as error:
            self._standing = Remembered(self, error)
            raise
        self._standing = None
        return engine

    def _engine_of_now(self) -> Any:
        if self._glance is None or not self._glance.same(self):
            weights = weights_state(self, self._copies_weights(), own=self._called())
            if weights != self._engine_weights:
                self._drop_engine()
                self._engine_weights = weights
            self._glance = Glance(self, self._copies_weights())
        if not all(copy.same() for copy in self._copies):  # an edit through .data
            self._drop_engine()
        if self._refusal is not None:
            raise NoEngine(self._refusal)
        engine = self._engine
        if engine is None:
            processes.forget_in_children(self)
            try:
                target = self._choose_target()
                if trial.path(type(self), "forward", self.engine_options) == "torch":
                    raise NoEngine(trial.reason("forward", "torch"))
                engine = self._engine = self._build_engine(target)
            except Standing:
                raise
            except (NoEngine, UnsupportedConfigError) as error:
                self._refusal = str(error)
                raise NoEngine(self._refusal) from error
            # once more: making weights contiguous may have moved them
            self._engine_weights = weights_state(self, self._copies_weights(), own=self._called())
            self._glance = Glance(self, self._copies_weights())
        return engine

    def _called(self) -> tuple[type, ...]:
        """Classes of the modules whose forward the engine's user calls, replaced or not."""
        return (EngineModule,)

    def _drop_engine(self) -> None:
        self._engine = self._refusal = self._standing = None
        self._copies = ()

    def _copies_weights(self) -> bool:
        """Whether engines hold weights a second time, and must be made anew after an edit."""
        return self.engine_options.prepack > 0 and self.device.type == "cpu"

    def _choose_target(self) -> Target:
        parameters = tensors_of(self)
        name, first = next(iter(parameters.items()))
        try:
            target = choose_target(self.engine_options, first.device, first.dtype)
        except NoEngine as error:
            raise self._while_as_it_is(name, first, str(error)) from error
        kept = tuple(getattr(self, "_keep_in_fp32_modules", None) or ())
        for name, parameter in parameters.items():
            if type(parameter.data) is not torch.Tensor or parameter.layout != torch.strided:
                reason = f"weights are no plain tensors ({name} is a {_kind(parameter)}): "
                raise self._while_as_it_is(name, parameter, reason + _QUANTISED)
            if not parameter.is_floating_point():
                reason = f"weights are integers ({name} is {parameter.dtype}): "
                raise self._while_as_it_is(name, parameter, reason + _QUANTISED)
            if parameter.device != first.device:
                raise NoEngine(f"{name} is on {parameter.device}, other weights on {first.device}")
            wide = parameter.dtype == torch.float32 and any(k in name.split(".") for k in kept)
            if parameter.dtype != first.dtype and not wide:
                refuse_adapters(self)
                raise NoEngine(f"{name} is {parameter.dtype}, other weights {first.dtype}")
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        return target

    def _while_as_it_is(self, name: str, parameter: torch.Tensor, reason: str) -> Standing:
        """A refusal that stands while the parameter is of its kind."""
        path, _, leaf = name.rpartition(".")
        kind = _kind(parameter), parameter.dtype, parameter.device

        def still(part: torch.nn.Module) -> bool:
            found = part._parameters.get(leaf)
            return found is not None and (_kind(found), found.dtype, found.device) == kind

        return Standing(reason, self.get_submodule(path), still)

    def _engine_for(
        self,
        name: str,
        root: graph_nn.Module,
        target: Target,
        method: str,
        specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
    ) -> Engine:
        """Load graph ``name`` from the engine cache, or build and store it, and compile it.

        Args:
            root: graph modules with this module's parameter names, used for one graph only.
            method: name of the method of ``root`` that builds the computation.
            specs: the graph's inputs and outputs.
        """
        own = tensors_of(self)
        wanted = {n for n, _ in root.named_parameters()}
        if missing := sorted(wanted - own.keys()):
            raise NoEngine(f"parameters were replaced: {missing[0]} is gone")
        types = {n: (str(own[n].dtype).removeprefix("torch."), tuple(own[n].shape)) for n in wanted}
        options, backend = self.engine_options, engines.backend(target.backend)
        device = next(iter(own.values())).device
        backend.check(device)

        def build() -> Artifact:
            graph = graphs.build(root, target, types, getattr(root, method), *specs)
            return backend.compile(graph, name, options, device)

        def load(artifact: Artifact) -> Engine:
            return backend.load(artifact, target, own, options)

        if kept := self._engine_cache():
            fast = type(self).__qualname__
            key = {"graph": name, "parameters": types, **engine_key(fast, self.config, target)}
            key |= {"inputs": [asdict(spec) for spec in specs[0]]}
            key |= {"backend": backend.key(target, options, device)}
            where = f"({target.backend}, {target.device}, {target.dtype})"
            engine = _kept(kept, key, build, load, title=f"{fast} {name} {where}")
        else:
            engine = load(build())
        if copied := getattr(engine, "copied", ()):
            self._copies += (Fingerprint(own[n] for n in copied),)
        return engine

    def _engine_cache(self) -> EngineCache | None:
        options = self.engine_options
        return EngineCache(options.cache_dir) if options.disk_cache else None

    def _refuse_foreign_parts(self, roots: Sequence[graph_nn.Module], ignore: str) -> None:
        """Adapters and the like add modules and parameters that no graph knows: torch runs them.

        Args:
            ignore: prefixes of the names of parts that ``roots`` do not stand for.
        """
        others = tuple(ignore.split())
        refuse_adapters(self, others)
        known = {name for root in roots for name, _ in root.named_parameters()}
        for name, _ in self.named_parameters(remove_duplicate=False):
            if name not in known and not name.startswith(others):
                raise NoEngine(f"parameter {name} is not part of the {type(self).__name__} graph")
        for name, module in self.named_modules():
            home = type(module).__module__.partition(".")[0]
            own = home in _KNOWN_LIBRARIES or isinstance(module, self._called())
            if not own and not name.startswith(others):
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise NoEngine(f"module {name} is a {kind}, which no graph knows")
        if changed := changed_part(self, self._twin(), others):
            raise NoEngine(changed)

    def _twin(self) -> torch.nn.Module:
        """The stock module as its config makes it, without weights."""
        with torch.device("meta"):
            twin: torch.nn.Module = stock_class(type(self))(self.config)
        return twin

    # What torch does to a module

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        if self._glance is None or not self._glance.same(self):  # not .to() where it is
            self.invalidate_engine()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.invalidate_engine()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """As of the stock class: transformers reads the source of the class's module to know."""
        stock: Any = stock_class(cls)
        return bool(stock._can_set_attn_implementation())

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)  # a copy or a pickle starts without an engine
        for name in (
            "_engine",
            "_engine_weights",
            "_copies",
            "_refusal",
            "_standing",
            "_reported",
            "_glance",
            "_parts",
            "_parts_glance",
        ):
            state.pop(name, None)
        return state


def _kept(
    cache: EngineCache,
    key: Mapping[str, object],
    build: Callable[[], Artifact],
    load: Callable[[Artifact], Engine],
    title: str,
) -> Engine:
    """What the engine cache holds, loaded; one that its backend refuses is built anew, once."""
    built = []

    def noted() -> Artifact:
        built.append(title)
        return build()

    try:
        return load(cache.load_or_build(key, noted, title=title))
    except engines.Unloadable as error:
        if built:  # again would be no other
            raise
        cache.discard(key, str(error))
        return load(cache.load_or_build(key, build, title=title))


def _kind(parameter: torch.Tensor) -> str:
    return type(parameter.data).__name__


def stock_class(fast: type) -> Any:
    """The Hugging Face class that a Fast class stands for."""
    return next(
        base
        for base in fast.__mro__
        if issubclass(base, PreTrainedModel) and not issubclass(base, EngineModule)
    )
