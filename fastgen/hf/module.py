"""The life of an engine inside a Hugging Face module: built lazily, dropped when weights move."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch

from fastgen import processes
from fastgen.calibration import Calibration
from fastgen.engines import NoEngine
from fastgen.errors import UnsupportedConfigError
from fastgen.explain import Explained
from fastgen.hf import trial
from fastgen.hf.building import BuildsEngines
from fastgen.hf.standing import Remembered, Standing
from fastgen.hf.stock import stock_class
from fastgen.hf.weights import Glance, weights_state
from fastgen.options import EngineOptions
from fastgen.target import Target


class _Steady(threading.local):
    """Modules whose weights this thread has just looked at, by id: served, or why not."""

    modules: frozenset[int] = frozenset()
    refused: Mapping[int, str] = MappingProxyType({})


_steady = _Steady()


class EngineModule(Explained, BuildsEngines):
    """Mixin of a Hugging Face module: keeps its compiled engines and knows when they are stale.

    Subclasses say in ``_build_engine`` what an engine of theirs is.
    """

    _engine: Any = None
    _engine_weights: tuple[Any, ...] | None = None
    _glance: Glance | None = None
    _parts: Sequence["EngineModule"] = ()
    _parts_glance: Glance | None = None
    _engine_options: EngineOptions | None = None
    _refusal: str | None = None
    _waits = False
    """Whether its engine is built by its own first call, not with the whole model's."""
    _standing: Remembered | None = None
    _calibrates = False
    """Whether it is a stack whose activations may be calibrated."""

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

    @property
    def calibration(self) -> Calibration | None:
        """Ranges of the encoder's activations, by which its engine computes in 8-bit integers; None
        computes in the model's own dtype. Assigning drops the engines built so far.

        Raises:
            TypeError: what is assigned is no Calibration, or the model has no Fast encoder.
        """
        return next((part._calibration for part in self._calibrated_parts()), None)

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        given: Any = calibration
        if not isinstance(given, Calibration | None):
            kind = type(given).__name__
            raise TypeError(f"calibration is a {kind}: fastgen.quantize.calibrate gives one.")
        parts = self._calibrated_parts()
        if not parts and calibration is not None:
            raise TypeError(f"{type(self).__qualname__} has no encoder that could be calibrated.")
        for part in parts:
            part._calibration = calibration
        self.invalidate_engine()

    def calibration_in_use(self) -> tuple[str | None, list[str]]:
        """How the calibration was found, if the encoder's engine computes by it, and in words of
        what it is not used for. The engine must be there, or may be built."""
        for part in self._calibrated_parts():
            if (known := part._calibration) is not None:
                used, gaps = part.calibrated_engine()
                return (known.method or "ranges as given") if used else None, gaps
        return None, []

    def calibrated_engine(self) -> tuple[bool, list[str]]:
        """Whether a stack's engine computes by its calibration, and in words of what not."""
        raise NotImplementedError

    def _calibrated_parts(self) -> "list[EngineModule]":
        parts = (part for part in self.modules() if isinstance(part, EngineModule))
        return [part for part in parts if part._calibrates]

    def invalidate_engine(self) -> None:
        """Drop compiled engines, KV buckets and captured graphs; the next call builds anew.

        Few calls need it: moving, casting, loading, resizing and edits are noticed, those through
        ``.data`` too, but on a GPU not those of numbers within a weight that
        ``EngineOptions.weights`` has made fewer bits of, which torch keeps no count of.
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
            else:  # but for what it does not see
                for part in self._parts:
                    if part._copies or part._looked:
                        part._has_engine()
            _steady.modules = outer[0] | {id(self), *map(id, self._parts)}
        try:
            yield
        finally:
            _steady.modules, _steady.refused = outer

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Take the weights as unchanged until the end of the body; a look at them must follow."""
        parts = self._parts if self._glance is self._parts_glance else ()
        outer, _steady.modules = _steady.modules, _steady.modules | {id(self), *map(id, parts)}
        try:
            yield
        finally:
            _steady.modules = outer

    def _looks_later(self) -> bool:
        """Whether engines may run before a look at the weights (``_looks_as``): their own Glance is
        that of the parts, and all memory is where it was."""
        glance = self._glance
        return (
            glance is not None
            and glance is self._parts_glance
            and not any(part._copies for part in (self, *self._parts))
            and glance.in_place()
        )

    def _looks_as(self, glance: Glance) -> bool:
        """Whether the weights are what they were when the Glance was made."""
        same = self._glance is glance and glance.same(self)
        looked = (look for part in (self, *self._parts) for look in part._looked)
        return same and all(look.same() for look in looked)

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

    @classmethod
    def is_of(cls, part: torch.nn.Module) -> bool:
        """Whether this class may take the place of a part that is of its stock class."""
        return True

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
                self._edited |= self._engine is not None
                self._drop_engine()
                self._engine_weights = weights
            self._glance = Glance(self, self._copies_weights())
        if not all(copy.same() for copy in (*self._copies, *self._looked)):  # through .data, say
            self._edited = True
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
        self._let_go()
        return engine

    def _drop_engine(self) -> None:
        self._engine = self._refusal = self._standing = None
        self._copies, self._made, self._gone, self._plain = (), {}, 0, frozenset()
        self._held, self._looked = {}, ()

    def _copies_weights(self) -> bool:
        """Whether engines hold weights a second time, and must be made anew after an edit."""
        options = self.engine_options
        widens = self._computes_in() != self.dtype
        packs = options.prepack > 0 and self.device.type == "cpu"
        return widens or packs or options.weights != "full" or self._calibration is not None

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
            "_looked",
            "_edited",
            "_made",
            "_held",
            "_gone",
            "_plain",
            "_refusal",
            "_standing",
            "_reported",
            "_glance",
            "_parts",
            "_parts_glance",
        ):
            state.pop(name, None)
        return state
