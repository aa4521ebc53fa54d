"""The life of an engine inside a Hugging Face module: built lazily, dropped when weights move."""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import onnxscript
import torch
import transformers
from onnxscript import nn as graph_nn
from transformers import PreTrainedModel

from fastgen import engines
from fastgen import graph as graphs
from fastgen.engine_cache import Artifact, EngineCache
from fastgen.engines import Engine, NoEngine, choose_target
from fastgen.errors import UnsupportedConfigError
from fastgen.graph import TensorSpec
from fastgen.options import EngineOptions
from fastgen.standing import Remembered, Standing
from fastgen.target import Target
from fastgen.weights import Glance, changed_part, refuse_adapters, weights_state

# Config fields that name where a model came from, not what it computes
_NOT_COMPUTATION = ("_name_or_path", "architectures", "transformers_version", "dtype")

_QUANTISED = "quantised or sharded, which only torch runs: load the model without that"

_KNOWN_LIBRARIES = ("torch", "transformers")


class _Steady(threading.local):
    """Modules whose weights this thread has just looked at, by id: served, or why not."""

    modules: frozenset[int] = frozenset()
    refused: Mapping[int, str] = MappingProxyType({})


_steady = _Steady()


class EngineModule(torch.nn.Module):
    """Mixin of a Hugging Face module: keeps its compiled engines and knows when they are stale.

    Subclasses say in ``_build_engine`` what an engine of theirs is.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    _engine: Any = None
    _engine_weights: tuple[Any, ...] | None = None
    _glance: Glance | None = None
    _parts: Sequence["EngineModule"] = ()
    _parts_glance: Glance | None = None
    _engine_options: EngineOptions | None = None
    _refusal: str | None = None
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

        Needed only after some weights were edited through ``.data`` while an engine on a CPU holds
        them packed (``EngineOptions.prepack``) too; moving, casting, loading, resizing and edits
        in place are noticed, and so is an edit through ``.data`` that changes most of a matrix.
        """
        for module in self.modules():
            if isinstance(module, EngineModule):
                module._engine = module._engine_weights = module._glance = module._refusal = None
                module._standing = None

    def compile_engine(self) -> None:
        """Build every engine now (and store it in the engine cache), not at the first call.

        Raises:
            NoEngine: no engine serves this model; the message says why.
        """
        for module in self.modules():
            if isinstance(module, EngineModule):
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
                self._parts = [part for part in parts if part._has_engine()]
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
            weights = weights_state(self, self._copies_weights(), own=EngineModule)
            if weights != self._engine_weights:
                self._engine = self._refusal = None
                self._engine_weights = weights
            self._glance = Glance(self, self._copies_weights())
        if self._refusal is not None:
            raise NoEngine(self._refusal)
        engine = self._engine
        if engine is None:
            try:
                engine = self._engine = self._build_engine(self._choose_target())
            except Standing:
                raise
            except (NoEngine, UnsupportedConfigError) as error:
                self._refusal = str(error)
                raise NoEngine(self._refusal) from error
            # once more: making weights contiguous may have moved them
            self._engine_weights = weights_state(self, self._copies_weights(), own=EngineModule)
            self._glance = Glance(self, self._copies_weights())
        return engine

    def _copies_weights(self) -> bool:
        """Whether engines hold weights a second time, and must be made anew after an edit."""
        return self.engine_options.prepack > 0 and self.device.type == "cpu"

    def _choose_target(self) -> Target:
        parameters = dict(self.named_parameters())
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
        own = dict(self.named_parameters(remove_duplicate=False))
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

        title = f"{type(self).__name__} {name} ({target.backend}, {target.device}, {target.dtype})"
        if kept := self._engine_cache():
            key = {"graph": name, "parameters": types, **_engine_key(self, target)}
            key |= {"inputs": [asdict(spec) for spec in specs[0]]}
            key |= {"backend": backend.key(target, options, device)}
            artifact = kept.load_or_build(key, build, title=title)
        else:
            artifact = build()
        return backend.load(artifact, target, own, options)

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
            own = home in _KNOWN_LIBRARIES or isinstance(module, EngineModule)
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

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)  # a copy or a pickle starts without an engine
        for name in (
            "_engine",
            "_engine_weights",
            "_refusal",
            "_standing",
            "_reported",
            "_glance",
            "_parts",
            "_parts_glance",
        ):
            state.pop(name, None)
        return state


def _kind(parameter: torch.Tensor) -> str:
    return type(parameter.data).__name__


def stock_class(fast: type) -> type:
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
        "class": type(module).__name__,
        "config": {k: repr(v) for k, v in config.items() if k not in _NOT_COMPUTATION},
        "target": asdict(target),
        "sources": _sources_digest(),
        **{library.__name__: library.__version__ for library in (transformers, onnx, onnxscript)},
    }
