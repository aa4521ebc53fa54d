"""FastGenerationMixin: ``generate`` unchanged, over the engine's KV cache."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from fastgen.errors import EngineError
from fastgen.explain import Explanation
from fastgen.generation import beam, loop
from fastgen.generation.call import Call
from fastgen.hf import contract, trial
from fastgen.hf.forward import as_torch
from fastgen.kv_cache import StaticKVCache

OPTIONAL_OUTPUTS = ("output_attentions", "output_hidden_states")
_FAST_MODES: tuple[Any, ...] = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
_MODES = (*_FAST_MODES, GenerationMode.ASSISTED_GENERATION)
_KINDS = dict(zip(_MODES, ("greedy", "sample", "beams", "beam sample", "assisted"), strict=True))
"""What ``hf/trial.py`` calls them."""
# Arguments of ``generate`` that become processors and criteria, or go with them: for any loop
_ANY_LOOP: tuple[str, ...] = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
)
_ANY_LOOP += ("tokenizer", "assistant_tokenizer")
_ANY_LOOP += ("negative_prompt_ids", "negative_prompt_attention_mask")


# What the HF loop calls for every token, and the fast loop does not
_STEPS = ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")

_F = TypeVar("_F", bound=Callable[..., Any])


def with_signature(function: _F) -> _F:
    """Keep the signature, which ``generate`` asks for several times a call at 50 us each."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


class FastGenerationMixin(GenerationMixin):
    """Mixin before a Hugging Face generation class: its ``generate`` runs on the engine."""

    @torch.no_grad()
    def explain(self, **generate_kwargs: Any) -> Explanation:
        """Say which path ``generate(**generate_kwargs)`` takes, without running it."""
        assistant = generate_kwargs.pop("assistant_model", None)
        config, model_kwargs = self._prepare_generation_config(
            generate_kwargs.pop("generation_config", None), **generate_kwargs
        )
        mode = config.get_generation_mode(assistant)
        reasons = self._torch_reasons(config, model_kwargs, mode)
        if reasons:
            return Explanation("torch", reasons)
        if mode not in _FAST_MODES:
            reasons.append(f"{mode.value} decodes in the HF loop")
        reasons += self._slow_reasons(config, model_kwargs)
        return Explanation("HF loop" if reasons else "fast loop", reasons)

    def _torch_reasons(self, config: Any, model_kwargs: dict[str, Any], mode: Any) -> list[str]:
        """Why the engine does not run a ``generate`` call at all."""
        reasons = []
        if self._path(mode) == "torch":
            reasons.append(trial.reason(_KINDS[mode], "torch"))
        if config.cache_implementation not in (None, "dynamic"):
            reasons.append(f"cache_implementation={config.cache_implementation!r} asks for torch's")
        arguments = {name: getattr(config, name) for name in OPTIONAL_OUTPUTS}
        arguments["inputs_embeds"] = None  # the encoder's affair: the decoder runs on the engine
        refusal = self.refusal(**{"decoder_input_ids": ..., **model_kwargs, **arguments})
        return reasons + ([refusal] if refusal else [])

    def _slow_reasons(self, config: Any, model_kwargs: dict[str, Any]) -> list[str]:
        """Why the engine is driven by the HF loop, not by the fast loop."""
        reasons = []
        if not self.engine_options.fast_loop:
            reasons.append("EngineOptions(fast_loop=False)")
        mode = config.get_generation_mode()
        if self._path(mode) != "fast loop":
            reasons.append(trial.reason(_KINDS[mode], "the HF loop"))
        if config.use_cache is False:
            reasons.append("use_cache=False")
        if config.output_hidden_states and config.return_dict_in_generate:
            reasons.append("output_hidden_states are collected by the HF loop")
        if config.prefill_chunk_size is not None:
            reasons.append("prefill_chunk_size is set")
        reasons += [f"{name} is the program's own" for name in _STEPS if not self._is_known(name)]
        if getattr(config, "is_assistant", False):
            reasons.append("an assistant model's tokens may be taken back")
        past = contract.given_cache(model_kwargs)
        if past is not None and past.get_seq_length():
            reasons.append(f"{contract.CACHE} already holds tokens")
        served: tuple[str, ...] = ("encoder_outputs", "attention_mask", "use_cache")
        served += (
            "output_hidden_states",
            "input_ids",
            "inputs",
            "decoder_input_ids",
            *contract.CACHE_NAMES,
            *_ANY_LOOP,
        )
        for name, value in model_kwargs.items():
            if value is not None and value is not False and name not in served:
                reasons.append(f"{name} is given")
        return reasons

    def _path(self, mode: Any) -> str:
        """The fastest path that is right in a decoding mode, as far as versions go."""
        return trial.path(type(self), _KINDS.get(mode, "other"), self.engine_options)

    def _is_known(self, method: str) -> bool:
        """Whether a method is the one of a library, which the fast loop does the work of."""
        home = getattr(type(self), method).__module__.partition(".")[0]
        return method not in vars(self) and home in ("fastgen", "transformers")

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Greedy decoding and sampling: the fast loop where it applies, else the HF loop."""
        return self._decode_by(super()._sample, loop.sample, args, kwargs)

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        """Beam search and beam sampling: the fast loop where it applies, else the HF loop."""
        return self._decode_by(super()._beam_search, beam.beam_search, args, kwargs)

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
        with call.decoder.turn():
            if not self.engine_options.check_fast_loop:
                return fast(call)
            devices = [call.decoder.device] if call.decoder.device.type == "cuda" else []
            again = {name: value for name, value in kwargs.items() if name != "streamer"}
            with torch.random.fork_rng(devices):
                expected = stock(*args, **again | {contract.CACHE: self._new_cache()})
            return _same_tokens(expected, fast(call))

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
        if synced_gpus or (config.num_beams > 1 and config.low_memory):
            return None
        if not isinstance(past, StaticKVCache) or self._slow_reasons(config, model_kwargs):
            return None
        arguments = {name: getattr(config, name) for name in OPTIONAL_OUTPUTS}
        if self.refusal(decoder_input_ids=input_ids, **{**model_kwargs, **arguments}) is not None:
            return None
        if criteria.max_length is None or model_kwargs.get("encoder_outputs") is None:
            return None
        hidden, mask = model_kwargs["encoder_outputs"][0], model_kwargs.get("attention_mask")
        decoder = self._current_engine()
        return Call(
            decoder, input_ids, logits_processor, criteria, config, streamer, hidden, mask, past
        )

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock ``generate``; DLPack tensors (of CuPy, say) are taken as torch tensors."""
        kwargs = {name: as_torch(value) for name, value in kwargs.items()}
        with self.steady():
            return super().generate(as_torch(inputs), *args, **kwargs)

    # as programs find it under the decorator of the stock one: the same without torch.no_grad()
    generate.__wrapped__ = GenerationMixin.generate.__wrapped__  # type: ignore[attr-defined]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate`` the engine's KV cache where it would make a dynamic one."""
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, GenerationMode))
        mode = next(given, None) or generation_config.get_generation_mode()
        if (
            self._path(mode) != "torch"
            and contract.given_cache(model_kwargs) is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation in (None, "dynamic")
        ):
            model_kwargs[contract.CACHE] = self._new_cache()
            return None
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )

    def _new_cache(self) -> StaticKVCache:
        return StaticKVCache(self.config.num_decoder_layers, self.config.num_hidden_layers)


def _same_tokens(expected: Any, result: Any) -> Any:
    """``result``, if its tokens are those of the HF loop."""
    tokens = [out if torch.is_tensor(out) else out.sequences for out in (expected, result)]
    if not torch.equal(*tokens):
        raise EngineError(
            f"check_fast_loop: the fast loop gave {tokens[1].tolist()}, the HF loop "
            f"{tokens[0].tolist()}. Use EngineOptions(fast_loop=False) and report this."
        )
    return result
