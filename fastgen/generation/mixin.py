"""FastGenerationMixin: ``generate`` unchanged, over the engine's KV cache."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from fastgen.engines import NoEngine
from fastgen.errors import EngineError
from fastgen.fallback import report
from fastgen.generation import beam_loop, known, loop
from fastgen.generation.call import Call
from fastgen.generation.explain import OPTIONAL_OUTPUTS, ExplainsGenerate
from fastgen.hf import contract
from fastgen.hf.cache import LeasedCache
from fastgen.hf.forward import as_torch
from fastgen.hf.outward import within


class _ChangedError(Exception):
    """Weights have changed since the last look at them."""


class FastGenerationMixin(ExplainsGenerate, GenerationMixin):
    """Mixin before a Hugging Face generation class: its ``generate`` runs on the engine."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Greedy decoding and sampling: the fast loop where it applies, else the HF loop."""
        return self._decode_by(super()._sample, loop.sample, args, kwargs)

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        """Beam search and beam sampling: the fast loop where it applies, else the HF loop."""
        return self._decode_by(super()._beam_search, beam_loop.beam_search, args, kwargs)

    # ``generate`` asks for these
    _sample.__signature__ = inspect.signature(GenerationMixin._sample)  # type: ignore[attr-defined]
    _beam_search.__signature__ = inspect.signature(  # type: ignore[attr-defined]
        GenerationMixin._beam_search
    )

    def _decode_by(
        self,
        stock: Callable[..., Any],
        fast: Callable[[Call], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Serve a decoding method by ``fast``, or else as it is given, argument by argument."""
        call = self._fast_call(*args, **kwargs) if self.engine_options.fast_loop else None
        if call is None:
            return stock(*args, **kwargs)
        if not self.engine_options.check_fast_loop:
            return self._decode(call, fast)
        with call.decoder.turn():
            devices = [call.decoder.device] if call.decoder.device.type == "cuda" else []
            again = {name: value for name, value in kwargs.items() if name != "streamer"}
            with torch.random.fork_rng(devices):
                expected = stock(*args, **again | {contract.CACHE: self._new_cache()})
            return _same_tokens(expected, fast(call))

    def _decode(self, call: Call, fast: Callable[[Call], Any]) -> Any:
        with call.decoder.turn():
            result = fast(call)
        known.served(self, call)
        return result

    def _fast_call(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Call | None:
        """What the fast loop needs to serve a decoding call; None if it does not serve it."""
        config, criteria = generation_config, stopping_criteria
        past = contract.given_cache(model_kwargs)
        if synced_gpus or not isinstance(past, LeasedCache):
            return None
        if not self._serves_fast_loop(config, model_kwargs):
            return None
        arguments = {name: getattr(config, name) for name in OPTIONAL_OUTPUTS}
        arguments[self._reads] = input_ids
        if self.refusal(**{**model_kwargs, **arguments}) is not None:
            return None
        decoder, hidden = self._current_engine(), None
        if decoder.shape.source:
            hidden = (model_kwargs.get("encoder_outputs") or (None,))[0]
        if criteria.max_length is None or (decoder.shape.source and hidden is None):
            return None
        mask = model_kwargs.get("attention_mask")
        return Call(
            decoder, input_ids, logits_processor, criteria, config, streamer, hidden, mask, past
        )

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock ``generate``; DLPack tensors (of CuPy, say) are taken as torch tensors."""
        kwargs, inputs = {name: as_torch(value) for name, value in kwargs.items()}, as_torch(inputs)
        given = None if args else known.given(self, inputs, kwargs)
        if given is not None and (found := self._ahead(given)) is not None:
            return found
        with self.steady(), within(self, getattr(self, "_encoder", self)):
            if reason := self.standing_refusal():
                report(self, "torch", reason)
            if given is None or reason:
                return super().generate(inputs, *args, **kwargs)
            if (call := self._known_call(given)) is not None:
                return self._decode_known(call)
            with known.noting() as note:
                result = super().generate(inputs, **kwargs)
            known.remember(self, given, note)
            return result

    @torch.no_grad()
    def _known_call(self, given: known.Given) -> Call | None:
        try:
            decoder = self._current_engine()
        except NoEngine:
            return None
        found = known.found(self, decoder, given)
        return None if found is None else known.again(self, decoder, given, found)

    @torch.no_grad()
    def _decode_known(self, call: Call) -> Any:
        beams = call.config.num_beams > 1
        return self._decode(call, beam_loop.beam_search if beams else loop.sample)

    def _ahead(self, given: known.Given) -> Any:
        """What a known call gives, launched before the look at the weights, so that a GPU computes
        meanwhile; None if it must begin anew, or nothing would be gained."""
        decoder, glance = self._engine, self._glance
        if decoder is None or not decoder.captures or not self._looks_later():
            return None
        of_call = known.found(self, decoder, given)
        if of_call is None or of_call.call.config.do_sample:  # numbers must not be drawn in vain
            return None

        def look() -> None:
            if not self._looks_as(glance):
                raise _ChangedError

        try:
            with self.unseen(), torch.no_grad():
                call = known.again(self, decoder, given, of_call)
                if call is None:
                    return None
                call.look = look
                return self._decode_known(call)
        except Exception:
            if self._looks_as(glance):
                raise
            return None

    def _encoded(self, ids: torch.Tensor, mask: torch.Tensor | None, config: Any) -> torch.Tensor:
        """What ``generate`` hands to its decoder of the encoder's, hidden states [B, S, E]."""
        raise NotImplementedError

    # as programs find it under the decorator of the stock one: the same without torch.no_grad()
    generate.__wrapped__ = GenerationMixin.generate.__wrapped__  # type: ignore[attr-defined]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate`` the engine's KV cache where it would make a dynamic one."""
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, GenerationMode))
        mode = next(given, None) or generation_config.get_generation_mode()
        if reason := self._unmet(mode, "torch"):
            report(self, "torch", reason)
        elif (
            contract.given_cache(model_kwargs) is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation in (None, "dynamic")
            and self.standing_refusal() is None
        ):
            model_kwargs[contract.CACHE] = self._new_cache()
            return None
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )

    def _new_cache(self) -> LeasedCache:
        """The engine's own KV cache, empty, as large as stock's ``generate`` makes one."""
        raise NotImplementedError


def _same_tokens(expected: Any, result: Any) -> Any:
    """``result``, if its tokens are those of the HF loop."""
    tokens = [out if torch.is_tensor(out) else out.sequences for out in (expected, result)]
    if not torch.equal(*tokens):
        raise EngineError(
            f"check_fast_loop: the fast loop gave {tokens[1].tolist()}, the HF loop "
            f"{tokens[0].tolist()}. Use EngineOptions(fast_loop=False) and report this."
        )
    return result
