"""FastGenerationMixin: ``generate`` unchanged, over the engine's KV cache."""

from dataclasses import dataclass, field
from typing import Any

import torch

from fastgen.kv_cache import StaticKVCache

OPTIONAL_OUTPUTS = ("output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Explanation:
    """Which path a ``generate`` call takes, and why not a faster one."""

    path: str
    """``fast loop``, ``HF loop`` (both on the engine) or ``torch``."""
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([self.path, *(f"  - {reason}" for reason in self.reasons)])


class FastGenerationMixin:
    """Mixin before a Hugging Face generation class: its ``generate`` runs on the engine."""

    @torch.no_grad()
    def explain(self, **generate_kwargs: Any) -> Explanation:
        """Say which path ``generate(**generate_kwargs)`` takes, without running it."""
        reasons = self._torch_reasons(generate_kwargs)
        if reasons:
            return Explanation("torch", reasons)
        return Explanation("HF loop", ["fast loop: not built yet"])

    def _torch_reasons(self, kwargs: dict[str, Any]) -> list[str]:
        config, model_kwargs = self._prepare_generation_config(
            kwargs.pop("generation_config", None), **kwargs
        )
        reasons = []
        if config.cache_implementation not in (None, "dynamic"):
            reasons.append(f"cache_implementation={config.cache_implementation!r} asks for torch's")
        arguments = {name: getattr(config, name) for name in OPTIONAL_OUTPUTS}
        refusal = self.refusal(**{"decoder_input_ids": ..., **arguments, **model_kwargs})
        return reasons + ([refusal] if refusal else [])

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock ``generate``; any DLPack tensor (of CuPy, say) is taken as a torch tensor."""
        kwargs = {name: as_torch(value) for name, value in kwargs.items()}
        return super().generate(as_torch(inputs), *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate`` the engine's KV cache where it would make a dynamic one."""
        if (
            model_kwargs.get("past_key_values") is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation in (None, "dynamic")
        ):
            model_kwargs["past_key_values"] = StaticKVCache(self.config.num_decoder_layers)
            return None
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )


def as_torch(value: Any) -> Any:
    """A foreign DLPack tensor as a torch tensor on the same memory; anything else as it is."""
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dlpack__"):
        return value
    return torch.from_dlpack(value)
