"""Encoders: which calls the engine serves."""

import weakref
from functools import cache
from typing import Any

import torch
from transformers.modeling_outputs import (
    BaseModelOutput,
)

from fastgen.engines import Engine, NoEngine, too_large
from fastgen.execution.encoder import Encoder
from fastgen.fallback import Asked
from fastgen.graphs.encoder import encoder_specs, packed_specs
from fastgen.hf.forward import StockForward
from fastgen.hf.module import EngineModule
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
    _packs = False
    """Whether the family's ``encode`` takes rows without their padding (``places``, ``tokens``)."""
    reads_padding = False
    """Whether a head reads the hidden states of padding, which are computed then."""
    _beside = ""
    """Prefixes of the parameters that no graph knows: of stock code beside it."""

    @classmethod
    def is_of(cls, part: Any) -> bool:
        """Whether a part of the stock class is an encoder: it may be of one class with decoders."""
        return not getattr(part, "is_decoder", False)

    def _encoder_root(self) -> Any:
        """The family's graph module with a method ``encode``, and its ``depth`` in blocks."""
        raise NotImplementedError

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

        options = self.engine_options
        packs = self._packs and options.skip_padding and target.device == "cpu"
        engine = build("encoder", encoder_specs(target, width, 0, more), root)
        return Encoder(
            *(engine, target, self.device, width, options, layers, states, more),
            packed if packs and not self.reads_padding else None,
        )

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
        try:
            self._current_engine()
        except NoEngine as error:
            return str(error)
        return None

    def _by_torch(self, **arguments: Any) -> Any:
        introduce(type(self), self.config)
        return super()._by_torch(**arguments)

    def _run(self, **arguments: Any) -> Any:
        """``forward`` on the engine: token ids [B, S] to hidden states [B, S, E]."""
        encoder: Encoder = self._current_engine()
        ids, mask = arguments["input_ids"].to(torch.int64), arguments.get("attention_mask")
        given = {name: arguments.get(name) for name in self._more_ids}
        more = {name: 0 if value is None else value for name, value in given.items()}
        states = None
        if states_wanted(self, arguments):
            states = as_stock(self, encoder.run_with_states(ids, mask, **more))
        output = self._output(encoder.run(ids, mask, **more) if states is None else states[-1])
        output.hidden_states = states
        return output if wants_dict(self, arguments.get("return_dict")) else output.to_tuple()

    def _output(self, hidden: torch.Tensor) -> Any:
        """The stock stack's output of these hidden states [B, S, E]."""
        return BaseModelOutput(last_hidden_state=hidden)
