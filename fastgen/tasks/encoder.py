"""Encoders: which calls the engine serves."""

import weakref
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers.modeling_outputs import (
    BaseModelOutput,
)

from fastgen.engines import Engine, NoEngine, NotFused, too_large
from fastgen.engines.fused.encoder import PackedEngine
from fastgen.execution.encoder import Encoder
from fastgen.fallback import Asked
from fastgen.graphs.encoder import POOLED, encoder_specs, packed_specs, pooler_specs
from fastgen.graphs.shape import LAST_STATE
from fastgen.hf.forward import StockForward
from fastgen.hf.module import EngineModule
from fastgen.hf.outward import given
from fastgen.target import Target
from fastgen.tasks.outputs import as_stock, introduce, wants_dict
from fastgen.tasks.refusals import (
    ENCODER_ARGUMENTS,
    common_refusal,
    ids_refusal,
    mask_refusal,
    states_wanted,
)


class FastEncoder(StockForward, EngineModule):
    """Mixin of an encoder stack: token ids in, hidden states out, on the engine."""

    _more_ids: tuple[str, ...] = ()
    """Arguments that the graph reads beside token ids, one for each; zeros where there are none."""
    _calibrates = True
    _packs = False
    """Whether the family's ``encode`` takes rows without their padding (``places``, ``tokens``)."""
    _skips_padding = False
    """Whether hidden states of padding may be zeros where no engine's kernels need them; of
    families that pack, too."""
    reads_padding = False
    """Whether a head reads the hidden states of padding, which are computed then."""
    _beside = ""
    """Prefixes of the parameters that no graph knows: of stock code beside it."""

    @classmethod
    def is_of(cls, part: Any) -> bool:
        """Whether a part of the stock class is an encoder: it may be of one class with decoders."""
        return not getattr(part, "is_decoder", False)

    @property
    def positions(self) -> int | None:
        """How many tokens a row may have; None: any number."""
        return None

    def _encoder_root(self) -> Any:
        """The family's graph module with a method ``encode``, and its ``depth`` in blocks."""
        raise NotImplementedError

    def _pooler_root(self) -> Any:
        """The graph module of its pooler, with a method ``pool``; None: stock code pools."""
        return None

    def _build_engine(self, target: Target) -> Encoder:
        root, width, more = self._encoder_root(), self.config.hidden_size, self._more_ids
        self._refuse_foreign_parts([root], ignore=self._beside)
        layers, stack = root.depth, weakref.proxy(self)

        def build(name: str, specs: Any, root: Any) -> Engine:
            engine: Engine = stack._engine_for(name, root, target, "encode", specs)
            return engine

        @cache
        def states() -> Engine:
            specs = encoder_specs(target, width, layers, more)
            return build("encoder-states", specs, stack._encoder_root())

        @cache
        def packed() -> Engine:
            return build("encoder-packed", packed_specs(target, width, more), stack._encoder_root())

        @cache
        def engine() -> Engine:
            specs = encoder_specs(target, width, 0, more)
            return build("encoder", specs, stack._encoder_root())

        options = self.engine_options
        skips = options.skip_padding and not self.reads_padding
        packs = self._packs and skips
        skips = skips and (self._packs or self._skips_padding)
        fused = self._fused_engine(target, padding=not skips)
        by_packed = packs and target.device == "cpu"
        if fused is None:  # else it serves hidden states of all layers only, and can wait
            (packed if by_packed and target.narrow else engine)()
        encoder = Encoder(
            *(engine, target, self.device, width, options, layers, states, more),
            packed if by_packed else None,
            fused,
        )
        if target.device == "cpu" and (pooler := self._pooler_root()) is not None:
            # by torch it would be the one thing to wake torch's threads, which then spin on where
            # the engine's are to run next
            specs = pooler_specs(target, width)
            encoder.pooling = self._engine_for("pooler", pooler, target, "pool", specs)
        return encoder

    def calibrated_engine(self) -> tuple[bool, list[str]]:
        """Whether the engine computes by the calibration, and in words of what not."""
        try:
            encoder: Encoder = self._current_engine()
        except NoEngine:
            return False, ["the calibration is not used: torch computes in the model's own dtype"]
        if encoder.target.calibration is not None:
            return True, []
        if encoder.fused is None:
            why = self._unfused or "EngineOptions(fused_kernels=False)"
            return False, [f"the calibration is not used: ONNX Runtime's kernels compute ({why})"]
        known = self._calibration
        if known is None or not (known.attention or known.residuals):
            return True, []
        return True, ["on a GPU the calibration is of linear layers: attention and sums are floats"]

    def _fused_engine(self, target: Target, padding: bool) -> PackedEngine | None:
        self._unfused = None
        served = target.device == "cuda" and target.contrib
        if not served or not self.engine_options.fused_kernels:
            return None
        root, own, kept = self._encoder_root(), self._weights(target), self._engine_cache()
        target = replace(target, calibration=self._calibration)
        known, more = self._held_for_kernels(own, root), self._more_ids
        held = {name: weight for name, weight in known.items() if not self._held[name].whole}
        try:
            fused = PackedEngine(root, target, self.device, own, padding, more, kept, held)
        except NotFused as error:  # T5 in float32, say, or another dtype of some weight
            self._unfused = str(error)
            return None
        self._plain |= fused.weight_pointers().keys() - self._held.keys()
        return fused

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a call with these arguments goes to torch; None if the engine serves it."""
        if reason := common_refusal(self, kwargs, ENCODER_ARGUMENTS.union(self._more_ids)):
            return reason
        input_ids = kwargs.get("input_ids")
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            return Asked("inputs_embeds are served by torch")
        if kwargs.get("use_cache"):
            return Asked("use_cache=True: torch reports that an encoder has no KV cache")
        mask = kwargs.get("attention_mask")
        if reason := ids_refusal(self, input_ids) or mask_refusal(mask, input_ids.shape):
            return reason
        if reason := too_large(self.engine_options, *input_ids.shape):
            return reason
        known, length = self.positions, input_ids.shape[1]
        if known is not None and length > known:
            return Asked(f"{length} tokens, where there are {known} positions")
        try:
            self._current_engine()
        except NoEngine as error:
            return str(error)
        return None

    def _forward(self, **arguments: Any) -> Any:
        found = self._run_ahead(arguments)
        return super()._forward(**arguments) if found is None else self._given(found, arguments)

    def _run_ahead(self, arguments: dict[str, Any]) -> Any:
        """``_compute``, if the look at the weights that follows finds the engine to be of now: a
        GPU computes meanwhile. None if it is not, or where nothing would be gained."""
        encoder: Encoder | None = self._engine
        if encoder is None or encoder.fused is None:
            return None
        with self.unseen():
            if self.refusal(**arguments) or arguments["input_ids"].device != encoder.device:
                return None
            found = self._compute(encoder, arguments)
        with suppress(NoEngine):
            return found if self._current_engine() is encoder else None
        return None

    def _by_torch(self, **arguments: Any) -> Any:
        introduce(type(self), self.config)
        return super()._by_torch(**arguments)

    def _run(self, **arguments: Any) -> Any:
        """``forward`` on the engine: token ids [B, S] to hidden states [B, S, E]."""
        # refusal() has looked; unless another thread dropped the engine since
        encoder: Encoder = self._engine or self._current_engine()
        return self._given(self._compute(encoder, arguments), arguments)

    def hidden(self, **arguments: Any) -> torch.Tensor | None:
        """The last hidden states that ``forward`` gives to ``generate``, without what goes about
        it; None if the engine does not serve the call."""
        if self.refusal(**arguments) is not None:
            return None
        return self._compute(self._engine or self._current_engine(), arguments)[0]

    def _compute(self, encoder: Encoder, arguments: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Hidden states [B, S, E], and those of all layers if they are wanted."""
        ids, mask = arguments["input_ids"].to(torch.int64), arguments.get("attention_mask")
        given = {name: arguments.get(name) for name in self._more_ids}
        more = {name: 0 if value is None else value for name, value in given.items()}
        if not states_wanted(self, arguments):
            return encoder.run(ids, mask, **more), None
        states = encoder.run_with_states(ids, mask, **more)
        return states[-1], as_stock(self, states)

    def _given(self, found: tuple[torch.Tensor, Any], arguments: dict[str, Any]) -> Any:
        output = self._output(found[0])
        output.hidden_states = found[1]
        return output if wants_dict(self, arguments.get("return_dict")) else output.to_tuple()

    def _pooled(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """What the pooler's graph makes of hidden states, [B, E]; None where there is none."""
        encoder: Encoder | None = self._engine
        if encoder is None or encoder.pooling is None:
            return None
        pooled = torch.empty(len(hidden), 1, hidden.shape[2])
        encoder.pooling.bind({LAST_STATE: hidden, POOLED: pooled}).run()
        return pooled[:, 0]

    def _output(self, hidden: torch.Tensor) -> Any:
        """The stock stack's output of these hidden states [B, S, E], as the engine gives them."""
        return BaseModelOutput(last_hidden_state=given(self, hidden))
