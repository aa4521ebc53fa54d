"""FastGenerationMixin: ``generate`` unchanged, over the engine's KV cache."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import GenerationMixin

from fastgen.errors import EngineError
from fastgen.fallback import report
from fastgen.generation import beam, loop
from fastgen.generation.explain import OPTIONAL_OUTPUTS, Explained, Explanation
from fastgen.kv_cache import StaticKVCache

__all__ = ["OPTIONAL_OUTPUTS", "Explanation", "FastGenerationMixin", "as_torch", "with_signature"]

_F = TypeVar("_F", bound=Callable[..., Any])


def with_signature(function: _F) -> _F:
    """Keep the signature, which ``generate`` asks for several times a call at 50 us each."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


class FastGenerationMixin(Explained, GenerationMixin):
    """Mixin before a Hugging Face generation class: its ``generate`` runs on the engine."""

    @with_signature
    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy decoding and sampling: the fast loop where it applies, else the HF loop."""
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        call = self._fast_call(*arguments, streamer, model_kwargs)
        if call is None or synced_gpus:
            return super()._sample(
                *arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs
            )

        def slow(**changed: Any) -> Any:
            return super(FastGenerationMixin, self)._sample(
                *arguments, **{**model_kwargs, **changed}
            )

        return self._checked(lambda: loop.sample(call), slow, call)

    @with_signature
    def _beam_search(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Beam search and beam sampling: the fast loop where it applies, else the HF loop."""
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        call = self._fast_call(*arguments, None, model_kwargs)
        if call is None or synced_gpus:
            return super()._beam_search(*arguments, synced_gpus=synced_gpus, **model_kwargs)

        def slow(**changed: Any) -> Any:
            return super(FastGenerationMixin, self)._beam_search(
                *arguments, **{**model_kwargs, **changed}
            )

        return self._checked(lambda: beam.beam_search(call), slow, call)

    def _checked(self, fast: Any, slow: Any, call: "loop.Call") -> Any:
        """Run the fast loop; with ``check_fast_loop``, first the HF loop, and compare."""
        with call.decoder.turn():
            if not self.engine_options.check_fast_loop:
                return fast()
            devices = [call.decoder.device] if call.decoder.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                expected = slow(past_key_values=StaticKVCache(self.config.num_decoder_layers))
            result = fast()
        tokens = [out if torch.is_tensor(out) else out.sequences for out in (expected, result)]
        if not torch.equal(*tokens):
            raise EngineError(
                f"check_fast_loop: the fast loop gave {tokens[1].tolist()}, the HF loop "
                f"{tokens[0].tolist()}. Use EngineOptions(fast_loop=False) and report this."
            )
        return result

    def _fast_call(
        self,
        input_ids: torch.Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> "loop.Call | None":
        """What the fast loop needs to serve a decoding call; None if it does not serve it."""
        past = model_kwargs.get("past_key_values")
        if not isinstance(past, StaticKVCache):
            return None
        if not self._serves_fast_loop(config, model_kwargs):
            return None
        arguments = {name: getattr(config, name) for name in OPTIONAL_OUTPUTS}
        if self.refusal(decoder_input_ids=input_ids, **{**model_kwargs, **arguments}) is not None:
            return None
        if criteria.max_length is None or model_kwargs.get("encoder_outputs") is None:
            return None
        hidden, mask = model_kwargs["encoder_outputs"][0], model_kwargs.get("attention_mask")
        decoder = self._current_engine()
        return loop.Call(
            decoder, input_ids, processors, criteria, config, streamer, hidden, mask, past
        )

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock ``generate``; DLPack tensors (of CuPy, say) are taken as torch tensors."""
        kwargs = {name: as_torch(value) for name, value in kwargs.items()}
        with self.steady():
            if reason := self.standing_refusal():
                report(self, "torch", reason)
            return super().generate(as_torch(inputs), *args, **kwargs)

    # as programs find it under the decorator of the stock one: the same without torch.no_grad()
    generate.__wrapped__ = GenerationMixin.generate.__wrapped__  # type: ignore[attr-defined]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate`` the engine's KV cache where it would make a dynamic one."""
        if (
            model_kwargs.get("past_key_values") is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation in (None, "dynamic")
            and self.standing_refusal() is None
        ):
            model_kwargs["past_key_values"] = StaticKVCache(self.config.num_decoder_layers)
            return None
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )


def as_torch(value: Any) -> Any:
    """A foreign DLPack tensor as a torch tensor on the same memory; anything else as it is, and so
    are NumPy arrays: the stock classes refuse them."""
    if isinstance(value, (torch.Tensor, np.ndarray)) or not hasattr(value, "__dlpack__"):
        return value
    return torch.from_dlpack(value)
