"""Encoder-decoder models: which calls the engine serves, and how torch serves the others."""

from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from fastgen.decoder import Decoder
from fastgen.engines import Binding, Engine, NoEngine
from fastgen.generation import OPTIONAL_OUTPUTS, FastGenerationMixin
from fastgen.kv_cache import StaticKVCache
from fastgen.modeling import EngineModule
from fastgen.options import EngineOptions
from fastgen.seq2seq import cross_specs, decoder_specs, encoder_specs
from fastgen.target import Target


class FastEncoder(EngineModule):
    """Mixin of an encoder stack: token ids in, hidden states out, on the engine."""

    def _encoder_root(self) -> Any:
        """The family's graph module with a method ``encode``."""
        raise NotImplementedError

    def _build_engine(self, target: Target) -> Engine:
        root = self._encoder_root()
        self._refuse_extra_parameters([root], ignore="")
        specs = encoder_specs(target, self.config.d_model)
        return self._engine_for("encoder", root, target, "encode", specs)

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a call with these arguments goes to torch; None if the engine serves it."""
        if reason := _common_refusal(self, kwargs):
            return reason
        if kwargs.get("input_ids") is None:
            return "inputs_embeds are served by torch"
        try:
            self._current_engine()
        except NoEngine as error:
            return str(error)
        return None

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock stack: token ids [B, S] to hidden states [B, S, E]."""
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if self.refusal(**arguments) is not None:
            _introduce(type(self), self.config)
            return super().forward(**arguments)
        output = BaseModelOutput(last_hidden_state=self._encode(input_ids, attention_mask))
        return output if _return_dict(self, kwargs) else output.to_tuple()

    def _encode(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        engine = self._current_engine()
        batch, sources = input_ids.shape
        positions = torch.arange(sources, device=input_ids.device)
        mask = torch.ones_like(input_ids) if mask is None else mask.to(torch.int64)
        hidden = torch.empty(
            *(batch, sources, self.config.d_model), dtype=self.dtype, device=input_ids.device
        )
        tensors = {
            "input_ids": input_ids.to(torch.int64).contiguous(),
            "attention_mask": mask.contiguous(),
            "query_positions": positions[:, None],
            "key_positions": positions[None, :],
            "last_hidden_state": hidden,
        }
        if hidden.numel():
            binding: Binding = engine.bind(tensors)
            binding.run()
        return hidden


class FastPreTrained(EngineModule):
    """Mixin of a whole Hugging Face model whose encoder stack is a FastEncoder."""

    _stack_class: type[FastEncoder]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.encoder.__class__ = self._stack_class

    @classmethod
    def from_pretrained(cls, *args: Any, engine_options: Any = None, **kwargs: Any) -> Any:
        """As the stock ``from_pretrained``.

        Args:
            engine_options: EngineOptions, a dict of them, or None for the defaults.
        """
        options = EngineOptions.resolve(engine_options)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        model.engine_options = options
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock ``save_pretrained``; the checkpoint names the stock class."""
        fast = self.__class__
        self.__class__ = stock_class(fast)
        try:
            return self.save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = fast


class FastEncoderModel(FastPreTrained):
    """Mixin of an encoder-only model: its stack does the work."""


class FastSeq2SeqLM(FastPreTrained, FastGenerationMixin):
    """Mixin of an encoder-decoder with a language model head."""

    def _decoder_root(self) -> Any:
        """The family's graph module with methods ``cross`` and ``decode``, and its ``shape``."""
        raise NotImplementedError

    def _build_engine(self, target: Target) -> Decoder:
        root = self._decoder_root()
        self._refuse_extra_parameters([root], ignore="shared. encoder.")
        shape = root.shape
        cross = self._engine_for("cross", root, target, "cross", cross_specs(target, shape))

        @cache
        def decoder(slot_mask: bool) -> Engine:
            name = "decoder-masked" if slot_mask else "decoder"
            specs = decoder_specs(target, shape, slot_mask)
            return self._engine_for(name, self._decoder_root(), target, "decode", specs)

        decoder(False)
        return Decoder(shape, target, self.device, cross, decoder, self.engine_options)

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a forward with these arguments goes to torch; None if the engine serves it."""
        if reason := _common_refusal(self, kwargs):
            return reason
        for name in ("inputs_embeds", "decoder_inputs_embeds", "labels"):
            if kwargs.get(name) is not None:
                return f"{name} are served by torch"
        if kwargs.get("decoder_input_ids") is None:
            return "no decoder_input_ids: torch reports what is missing"
        mask = kwargs.get("decoder_attention_mask")
        if mask is not None and not bool(mask.all()):
            return "decoder_attention_mask hides tokens"
        past = kwargs.get("past_key_values")
        if past is not None and not isinstance(past, StaticKVCache):
            return f"past_key_values is a {type(past).__name__}, not the engine's own KV cache"
        if past is not None and past.bucket is not None and self._engine is not None:
            return None  # a further token: what could refuse it was looked at with the first
        return self._engine_refusal(past)

    def _engine_refusal(self, past: StaticKVCache | None) -> str | None:
        try:
            decoder = self._current_engine()
        except NoEngine as error:
            return str(error)
        if past is not None and past.bucket is not None:
            if past.bucket.target != decoder.target or past.bucket.device != decoder.device:
                return "past_key_values was made by another engine"
        return None

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock model: arguments, shapes and outputs are those of its ``forward``."""
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            **kwargs,
        }
        if self.refusal(**arguments) is not None:
            return super().forward(**arguments)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        hidden = encoder_outputs[0]
        if use_cache is None:
            use_cache = self.config.use_cache
        past = past_key_values
        if past is None:
            past = StaticKVCache(self.config.num_decoder_layers)
        output = Seq2SeqLMOutput(
            logits=self._decode(decoder_input_ids, hidden, attention_mask, past),
            past_key_values=past if use_cache or past_key_values is not None else None,
            encoder_last_hidden_state=hidden,
        )
        return output if _return_dict(self, kwargs) else output.to_tuple()

    def _decode(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        past: StaticKVCache,
    ) -> torch.Tensor:
        decoder: Decoder = self._engine
        length = past.get_seq_length()
        total = length + input_ids.shape[1]
        with decoder.lock:
            bucket = decoder.enter(past, hidden, mask, total)
            logits = decoder.run(bucket, input_ids, length)
            if logits is bucket.tensors["logits"]:
                logits = logits.clone()  # the next step overwrites the bucket's own
        past.fill(total)
        return logits


_introduced: set[type] = set()


def _introduce(stack_class: type, config: Any) -> None:
    """Let transformers learn which outputs a stack can record: it does when one is constructed,
    and ours took the place of a stock one (or came out of a pickle)."""
    if stack_class not in _introduced:
        with torch.device("meta"):
            stack_class(config)
        _introduced.add(stack_class)


def stock_class(fast: type) -> type:
    """The Hugging Face class that a Fast class stands for."""
    return next(
        base
        for base in fast.__mro__
        if issubclass(base, PreTrainedModel) and not issubclass(base, EngineModule)
    )


def _common_refusal(module: EngineModule, kwargs: dict[str, Any]) -> str | None:
    """What no engine serves, whatever the model."""
    if module.training:
        return "the model is in training mode: call model.eval()"
    if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        return "gradients may be asked for: wrap the call in torch.no_grad()"
    for name in OPTIONAL_OUTPUTS:
        asked = kwargs.pop(name, None)
        if asked or (asked is None and getattr(module.config, name, False)):
            return f"{name} are recorded by torch only"
    return None


def _return_dict(module: EngineModule, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("return_dict")
    return bool(module.config.return_dict if asked is None else asked)
