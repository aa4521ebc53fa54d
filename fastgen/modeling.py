"""The life of an engine inside a Hugging Face module: built lazily, dropped when weights move."""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
import transformers
from onnxscript import nn as graph_nn
from transformers import PreTrainedModel

from fastgen import engines, processes
from fastgen import graph as graphs
from fastgen.engine_cache import Artifact, EngineCache
from fastgen.engines import Engine, NoEngine, choose_target
from fastgen.errors import UnsupportedConfigError
from fastgen.explain import Explained
from fastgen.graph import TensorSpec
from fastgen.hf import trial
from fastgen.options import EngineOptions
from fastgen.target import Target
from fastgen.weights import Fingerprint, Glance, changed_part, weights_state

# Config fields that name where a model came from, not what it computes
_NOT_COMPUTATION = ("_name_or_path", "architectures", "transformers_version", "dtype")

_KNOWN_LIBRARIES = ("torch", "transformers", "fastgen")


class _Steady(threading.local):
    """Modules whose weights this thread has just looked at, by id."""

    modules: frozenset[int] = frozenset()


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
        outer = _steady.modules
        with suppress(NoEngine):
            self._current_engine()
            glance = self._glance
            if glance is not None and glance is not self._parts_glance:
                parts = [m for m in glance.descendants if isinstance(m, EngineModule)]
                self._parts = [part for part in parts if not part._waits]
                for part in self._parts:
                    part._current_engine()
                self._parts_glance = glance  # until it changes, so do none of the parts
            _steady.modules = outer | {id(self), *map(id, self._parts)}
        try:
            yield
        finally:
            _steady.modules = outer

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
        self._engine = self._refusal = None
        self._copies = ()

    def _copies_weights(self) -> bool:
        """Whether engines hold weights a second time, and must be made anew after an edit."""
        return self.engine_options.prepack > 0 and self.device.type == "cpu"

    def _choose_target(self) -> Target:
        parameters = dict(self.named_parameters())
        first = next(iter(parameters.values()))
        target = choose_target(self.engine_options, first.device, first.dtype)
        kept = tuple(getattr(self, "_keep_in_fp32_modules", None) or ())
        for name, parameter in parameters.items():
            if type(parameter.data) is not torch.Tensor or parameter.layout != torch.strided:
                raise NoEngine(f"{name} is a {type(parameter.data).__name__}, no plain tensor")
            if parameter.device != first.device:
                raise NoEngine(f"{name} is on {parameter.device}, other weights on {first.device}")
            wide = parameter.dtype == torch.float32 and any(k in name.split(".") for k in kept)
            if parameter.dtype != first.dtype and not wide:
                raise NoEngine(f"{name} is {parameter.dtype}, other weights {first.dtype}")
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        return target

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
        own = dict(self.named_parameters(remove_duplicate=False))
        wanted = {n for n, _ in root.named_parameters()}
        if missing := sorted(wanted - own.keys()):
            raise NoEngine(f"parameters were replaced: {missing[0]} is gone")
        types = {n: (str(own[n].dtype).removeprefix("torch."), tuple(own[n].shape)) for n in wanted}
        options, backend = self.engine_options, engines.backend(target.backend)
        device = next(iter(own.values())).device
        backend.check(device)
        built = []

        def build() -> Artifact:
            built.append(name)
            graph = graphs.build(root, target, types, getattr(root, method), *specs)
            return backend.compile(graph, name, options, device)

        where = f"({target.backend}, {target.device}, {target.dtype})"
        title = f"{type(self).__qualname__} {name} {where}"
        if kept := self._engine_cache():
            key = {"graph": name, "parameters": types, **_engine_key(self, target)}
            key |= {"inputs": [asdict(spec) for spec in specs[0]]}
            key |= {"backend": backend.key(target, options, device)}
            artifact = kept.load_or_build(key, build, title=title)
            try:
                engine = backend.load(artifact, target, own, options)
            except engines.Unloadable as error:
                if built:  # again would be no other
                    raise
                kept.discard(key, str(error))
                artifact = kept.load_or_build(key, build, title=title)
                engine = backend.load(artifact, target, own, options)
        else:
            engine = backend.load(build(), target, own, options)
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
            "_glance",
            "_parts",
            "_parts_glance",
        ):
            state.pop(name, None)
        return state


def stock_class(fast: type) -> Any:
    """The Hugging Face class that a Fast class stands for."""
    return next(
        base
        for base in fast.__mro__
        if issubclass(base, PreTrainedModel) and not issubclass(base, EngineModule)
    )


@cache
def _sources_digest() -> str:
    """Digest of the code that writes graphs: when it changes, so do they."""
    folder = Path(__file__).parent
    files = [folder / f"{name}.py" for name in ("contrib_ops", "graph", "ops", "seq2seq", "target")]
    digest = hashlib.sha256()
    for file in [*files, *sorted((folder / "models").glob("*.py"))]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _engine_key(module: EngineModule, target: Target) -> dict[str, Any]:
    """Everything besides parameters that changes a compiled graph: no path, no time."""
    config = module.config.to_dict()
    return {
        "class": type(module).__qualname__,
        "config": {k: repr(v) for k, v in config.items() if k not in _NOT_COMPUTATION},
        "target": asdict(target),
        "sources": _sources_digest(),
        **{library.__name__: library.__version__ for library in (transformers, onnx, onnxscript)},
    }
