"""How a module's engine is made: its Target, the parts that no graph knows, the engine cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

import torch
from onnxscript import nn as graph_nn

from fastgen import processes
from fastgen.blockwise import is_made
from fastgen.calibration import Calibration
from fastgen.engine_cache import Artifact, EngineCache
from fastgen.engines import Engine, NoEngine, Unloadable, choice
from fastgen.engines.choice import choose_target
from fastgen.engines.fused.recorder import Narrow
from fastgen.file_pages import FilePages
from fastgen.graphs import graph as graphs
from fastgen.graphs.graph import TensorSpec
from fastgen.hf import found, stored
from fastgen.hf.checkpoints import table
from fastgen.hf.checkpoints.held import Held, Looked
from fastgen.hf.engine_key import engine_key
from fastgen.hf.let_go import Gone
from fastgen.hf.quantised import AnyKey, Made, Weights
from fastgen.hf.standing import Standing
from fastgen.hf.stock import stock_class
from fastgen.hf.weights import Fingerprint, changed_part, refuse_adapters, tensors_of, watched
from fastgen.progress import progress
from fastgen.target import Target

_QUANTISED = "quantised or sharded, which only torch runs: load the model without that"

# Of a weight that integers were made of, which rows tell of an edit: to read all of them, as often
# as an encoder is called, would take a good part of what its products take
_LOOKED_AT = 32

_KNOWN_LIBRARIES = ("torch", "transformers", "fastgen")


class BuildsEngines(torch.nn.Module):
    """Mixin of a Hugging Face module that makes engines of its parameters."""

    config: Any
    device: torch.device
    dtype: torch.dtype
    engine_options: Any
    _copies: tuple[FilePages | Fingerprint, ...] = ()
    """What the weights were that engines hold a second time."""
    _looked: tuple[Looked, ...] = ()
    """What weights in fewer bits were; nothing that engines read of them goes with them."""
    _made: dict[AnyKey, Made]
    """What engines read instead of weights."""
    _held: Mapping[str, Held] = MappingProxyType({})
    """Weights that the model has in fewer bits, and that engines read, by their stock names."""
    _unfused: str | None = None
    """Why fused kernels do not run it, in words."""
    _calibration: Calibration | None = None
    _gone = 0
    """How many of them there were when torch's weights were let go last."""
    _plain: frozenset[str] = frozenset()
    """Parameters that engines read as they are."""
    _edited = False
    """Whether weights changed under an engine, as in training: what is made of them stays off the
    disk, which each step would fill a bit more."""

    def _called(self) -> tuple[type, ...]:
        """Classes of the modules whose forward the engine's user calls, replaced or not."""
        return (BuildsEngines,)

    def _choose_target(self) -> Target:
        known = table.known_in(self)
        self._held = table.weights_in(known)
        parameters = self._own_tensors()
        name, first = next(iter(parameters.items()))
        try:
            target = choose_target(self.engine_options, first.device, first.dtype)
        except NoEngine as error:
            raise self._while_as_it_is(name, first, str(error)) from error
        target = table.served(target, self._held.values())
        kept = tuple(getattr(self, "_keep_in_fp32_modules", None) or ())
        if refusal := table.refusal(known):
            raise refusal
        for name, parameter in parameters.items():
            if isinstance(parameter, Gone):
                parameter.refuse()
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
        if target.dtype == "float16" and not target.held:
            target = replace(target, wide=found.recalled(self))
        return replace(target, calibration=self._calibration) if target.integers else target

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
        own = self._weights(target)
        types, forms = own.described([n for n, _ in root.named_parameters()])
        options, backend = self.engine_options, choice.backend(target.backend)
        device = next(iter(own.values())).device
        backend.check(device)

        def build() -> Artifact:
            graph = graphs.build(root, target, types, getattr(root, method), *specs, forms)
            return backend.compile(graph, name, options, device)

        fast = type(self).__qualname__

        def load(artifact: Artifact) -> Engine:
            if not target.narrow:
                return backend.load(artifact, target, own, options)
            title = f"{fast} {name}: {self.narrow_weights() or target.weights} weights"
            with progress(title):
                if kept and self.device.type == "cpu" and not self._edited:
                    stored.recall(own, artifact.meta["parameters"], kept, title)
                return backend.load(artifact, target, own, options)

        if kept := self._engine_cache():
            key = {"graph": name, "parameters": types, **engine_key(fast, self.config, target)}
            key |= {"inputs": [asdict(spec) for spec in specs[0]]}
            key |= {"held": {name: asdict(form) for name, form in forms.items()}}
            key |= {"backend": backend.key(target, options, device)}
            where = f"({target.backend}, {target.device}, {target.dtype})"
            engine = _kept(kept, key, build, load, title=f"{fast} {name} {where}")
        else:
            engine = load(build())
        self._note(engine, own)
        return engine

    def _note(self, engine: Engine, own: Weights) -> None:
        """Remember what an engine reads, and what it holds a second time."""
        read, copied = engine.weight_pointers(), getattr(engine, "copied", ())
        self._plain |= {name for name in read if not is_made(name) and not own.widens(name)}
        own.packed(copied)
        widened = (name for name in read if not is_made(name) and own.widens(name))
        left = own.sources(dict.fromkeys((*copied, *widened)))
        self._looked += own.looked_at([*copied, *read])
        known = {place for copy in self._copies for place in copy.places}
        if left := [part for part in left if (part.data_ptr(), part.nbytes) not in known]:
            threads = self.engine_options.intra_op_threads or processes.threads()
            copies = watched(left, threads)
            for pages in copies:
                if isinstance(pages, FilePages):
                    pages.give_back()
            self._copies += (*copies,)
        if self.device.type == "cpu" and (rounded := own.rounded()):
            self._copies += (Fingerprint(part.detach()[::_LOOKED_AT] for part in rounded),)

    def _weights(self, target: Target | None = None) -> Weights:
        """What engines of a target read: parameters, and what is made of them; without one, what is
        to be let go."""
        exact = self.engine_options.weights == "full" and self.device.type == "cpu"
        wide = target is not None and target.dtype == "float32"
        on_gpu = self.device.type == "cuda"
        narrow = ((name, weight) for name, weight in self._held.items() if not weight.whole)
        forms = {name: weight.form(exact, on_gpu) for name, weight in narrow}
        own, whole = self._own_tensors(), self._read_whole()
        return Weights(own, self._made, whole, wide, self._held, forms)

    def _computes_in(self) -> torch.dtype:
        """What engines compute in: on a CPU float32, else the model's dtype."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, but for what a library holds in place of a weight."""
        held = {name.rpartition(".")[0] for name in self._held}
        parts = ((name, *name.rpartition("."), t) for name, t in tensors_of(self).items())
        return {n: t for n, path, _, leaf, t in parts if path not in held or leaf == "bias"}

    def narrow_weights(self) -> str | None:
        """What engines read of a checkpoint in fewer bits, in words; None if it is of full ones."""
        parts = (part for part in self.modules() if isinstance(part, BuildsEngines))
        kinds = {(s.library, s.kind) for part in parts for s in part._held.values()}
        return " and ".join(f"{library}'s {kind}" for library, kind in sorted(kinds)) or None

    def narrow_reasons(self) -> list[str]:
        """Why other kernels than the fused ones compute by a checkpoint in fewer bits."""
        parts = [part for part in self.modules() if isinstance(part, BuildsEngines) and part._held]
        whys = ((type(part).__qualname__, part._unfused) for part in parts if part._unfused)
        return [f"ONNX Runtime's kernels run {name}: {why}" for name, why in dict.fromkeys(whys)]

    def _read_whole(self) -> set[int] | None:
        """Ids of the parameters that stay with ``keep_torch_weights=False``, as something looks
        them up, or reads them by pointer; None: all stay."""
        if self.engine_options.keep_torch_weights:
            return None
        found = set()
        for part in self.modules():
            if isinstance(part, torch.nn.Embedding):
                found.add(id(part.weight))
            elif isinstance(part, BuildsEngines) and part._plain:
                own = tensors_of(part)
                found |= {id(own[name]) for name in part._plain if name in own}
        return found

    def _held_for_kernels(self, own: Weights, root: graph_nn.Module) -> dict[str, Narrow]:
        """What fused kernels read of a checkpoint in fewer bits, whose edits are looked for."""
        held = {name: own.held[name] for name, _ in root.named_parameters() if name in own.held}
        found = {n: Narrow(weight.form_of_kernels(), weight.shape) for n, weight in held.items()}
        self._looked += own.looked_at(weight.form.names(n)[0] for n, weight in found.items())
        return found

    def _let_go(self) -> None:
        """Let torch's weights go, where that is asked for, of which more were made since."""
        if self._gone != len(self._made) and not self.engine_options.keep_torch_weights:
            self._weights().let_go()
            self._gone = len(self._made)

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
        others += tuple(name.removesuffix("weight") for name in self._held)
        for name, _ in self.named_parameters(remove_duplicate=False):
            if name not in known and not name.startswith(others):
                raise NoEngine(f"parameter {name} is not part of the {type(self).__name__} graph")
        for name, module in self.named_modules():
            home = type(module).__module__.partition(".")[0]
            own = home in _KNOWN_LIBRARIES or isinstance(module, self._called())
            if not own and not f"{name}.".startswith(others):
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise NoEngine(f"module {name} is a {kind}, which no graph knows")
        if changed := changed_part(self, self._twin(), others):
            raise NoEngine(changed)

    def _twin(self) -> torch.nn.Module:
        """The stock module as its config makes it, without weights."""
        with torch.device("meta"):
            twin: torch.nn.Module = stock_class(type(self))(self.config)
        return twin


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
    except Unloadable as error:
        if built:  # again would be no other
            raise
        cache.discard(key, str(error))
        return load(cache.load_or_build(key, build, title=title))


def _kind(parameter: torch.Tensor) -> str:
    return type(parameter.data).__name__
