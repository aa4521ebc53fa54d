"""Which path a ``generate`` call takes, and why not a faster one: ``model.explain``."""

import inspect
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode

from fastgen.engines import too_large
from fastgen.explain import Explanation
from fastgen.fallback import AUTOCAST, Asked, report, runs_under_autocast
from fastgen.hf import contract, trial
from fastgen.options import EngineOptions

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
ANY_LOOP: tuple[str, ...] = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
)
ANY_LOOP += ("tokenizer", "assistant_tokenizer")
ANY_LOOP += ("negative_prompt_ids", "negative_prompt_attention_mask")

# Whoever gives these knows that they cost
_SAYS_SO = (*OPTIONAL_OUTPUTS, "inputs_embeds", "decoder_inputs_embeds")

# What the HF loop calls for every token, and the fast loop does not
_STEPS = ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


class ExplainsGenerate:
    """Mixin of a model that generates: says how, and tells the loops what they serve."""

    engine_options: EngineOptions
    refusal: Any
    _by_engine: Any
    _prepare_generation_config: Any
    _reads = "decoder_input_ids"
    """The argument of ``forward`` that a loop's tokens go to."""
    _by_any_loop: tuple[str, ...] = ("encoder_outputs", "decoder_input_ids")
    """Further arguments of ``generate`` that both loops serve."""

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
        path = "HF loop" if reasons else "fast loop"
        found: Explanation = self._by_engine(path, reasons)
        return found

    def ran_fused(self) -> bool | None:
        """Whether fastgen's fused kernels ran the steps of the last ``generate`` call on the
        engine; None where they do not exist (on a CPU, say), and before such a call."""
        decoder = getattr(self, "_engine", None)
        return None if decoder is None else decoder.steps_fused()

    def _torch_reasons(self, config: Any, model_kwargs: dict[str, Any], mode: Any) -> list[str]:
        """Why the engine does not run a ``generate`` call at all."""
        reasons = []
        if reason := self._unmet(mode, "torch"):
            reasons.append(reason)
        if config.cache_implementation not in (None, "dynamic"):
            asked = f"cache_implementation={config.cache_implementation!r}"
            reasons.append(f"{asked} asks for a KV cache of torch's: leave it out")
        if runs_under_autocast(vars(self).get("forward")):
            reasons.append(AUTOCAST)
        arguments = {name: getattr(config, name) for name in OPTIONAL_OUTPUTS}
        # these are the encoder's affair, or become part of what the decoder reads
        arguments |= dict.fromkeys(("inputs_embeds", "decoder_attention_mask", "labels"))
        first, refusal = self._first_call(dict(model_kwargs)), None
        ids = first["input_ids"]
        if isinstance(ids, torch.Tensor) and ids.ndim == 2:  # of which generate() makes more rows
            rows = len(ids) * max(config.num_beams, config.num_return_sequences)
            refusal = too_large(self.engine_options, rows, ids.shape[1])
        refusal = refusal or self.refusal(**{**first, **arguments})
        return reasons + ([refusal] if refusal else [])

    def _first_call(self, given: dict[str, Any]) -> dict[str, Any]:
        """What ``generate`` with these arguments gives ``forward`` first; ``...`` for what is not
        given."""
        given["input_ids"] = given.pop("inputs", given.get("input_ids"))
        return {"decoder_input_ids": ...} | given

    def _slow_reasons(self, config: Any, model_kwargs: dict[str, Any]) -> list[str]:
        """Why the engine is driven by the HF loop, not by the fast loop."""
        reasons: list[str] = []
        if not self.engine_options.fast_loop:
            reasons.append(Asked("EngineOptions(fast_loop=False)"))
        if reason := self._unmet(config.get_generation_mode(), "HF loop"):
            reasons.append(reason)
        if config.use_cache is False:
            reasons.append(Asked("use_cache=False"))
        if config.output_hidden_states and config.return_dict_in_generate:
            reasons.append(Asked("output_hidden_states are collected by the HF loop"))
        if config.prefill_chunk_size is not None:
            reasons.append("prefill_chunk_size is set: leave it out")
        if config.num_beams > 1 and getattr(config, "low_memory", None):
            reasons.append(Asked("low_memory=True"))
        if config.num_beams < 1:
            reasons.append(Asked(f"num_beams={config.num_beams}: transformers reports it"))
        own = [name for name in _STEPS if not self._is_known(name)]
        if runs_under_autocast(vars(self).get("forward")):
            reasons.append(Asked(AUTOCAST))  # which forward itself warns of
            own.remove("forward")
        reasons += [f"{name} is the program's own: the fast loop does not call it" for name in own]
        if getattr(config, "is_assistant", False):
            reasons.append(Asked("an assistant model's tokens may be taken back"))
        past = contract.given_cache(model_kwargs)
        if past is not None and past.get_seq_length():
            reasons.append(Asked(f"{contract.CACHE} already holds tokens"))
        served: tuple[str, ...] = ("attention_mask", "use_cache", *self._by_any_loop)
        served += ("output_hidden_states", "input_ids", "inputs")
        served += ("labels",)  # which Seq2SeqTrainer gives, and no loop reads
        served += (*contract.CACHE_NAMES, *ANY_LOOP)
        for name, value in model_kwargs.items():
            if value is not None and value is not False and name not in served:
                asked = Asked if name in _SAYS_SO else str
                reasons.append(asked(f"{name} is given: leave it out if it can be"))
        return reasons

    def _unmet(self, mode: Any, path: str) -> str | None:
        """Why a version of transformers that nobody has met sends a decoding mode to this path."""
        kind = _KINDS.get(mode, "other")
        found = trial.path(type(self), kind, self.engine_options)
        return trial.reason(kind, path) if found == path else None

    def _is_known(self, method: str) -> bool:
        """Whether a method is the one of a library, which the fast loop does the work of."""
        of_class, own = getattr(type(self), method), vars(self).get(method)
        # Accelerate puts the class's method back as an attribute, without its decorators
        known = own is None or getattr(own, "__func__", None) in (
            of_class,
            inspect.unwrap(of_class),
        )
        return known and of_class.__module__.partition(".")[0] in ("fastgen", "transformers")

    def _serves_fast_loop(self, config: Any, model_kwargs: dict[str, Any]) -> bool:
        """Whether nothing is asked for that the fast loop does not do; warns of what surprises."""
        reasons = self._slow_reasons(config, model_kwargs)
        if not any(isinstance(reason, Asked) for reason in reasons):
            for reason in reasons:
                report(self, "HF loop", reason)
        return not reasons
