"""Encoder-decoder models: which calls the engine serves, and how torch serves the others."""

import weakref
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from fastgen.decoder import Decoder
from fastgen.encoder import Encoder
from fastgen.engines import Engine, NoEngine, too_large
from fastgen.engines.fused import FusedEngine
from fastgen.fallback import Asked, report
from fastgen.generation import FastGenerationMixin, as_torch, with_signature
from fastgen.kv_cache import Bucket, StaticKVCache
from fastgen.modeling import EngineModule, stock_class
from fastgen.options import EngineOptions
from fastgen.refusals import (
    ENCODER_ARGUMENTS,
    MODEL_ARGUMENTS,
    common_refusal,
    decoder_mask_refusal,
    form_refusal,
    hidden_refusal,
    ids_refusal,
    mask_refusal,
    same_mask,
)
from fastgen.seq2seq import cross_specs, decoder_specs, encoder_specs
from fastgen.target import Target


class FastEncoder(EngineModule):
    """Mixin of an encoder stack: token ids in, hidden states out, on the engine."""

    def _encoder_root(self) -> Any:
        """The family's graph module with a method ``encode``."""
        raise NotImplementedError

    def _build_engine(self, target: Target) -> Encoder:
        root, width = self._encoder_root(), self.config.d_model
        self._refuse_foreign_parts([root], ignore="")
        specs = encoder_specs(target, width)
        engine = self._engine_for("encoder", root, target, "encode", specs)
        return Encoder(engine, target, self.device, width, self.engine_options)

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a call with these arguments goes to torch; None if the engine serves it."""
        if reason := common_refusal(self, kwargs, ENCODER_ARGUMENTS):
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

    @with_signature
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock stack: token ids [B, S] to hidden states [B, S, E]."""
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        arguments = {name: as_torch(value) for name, value in arguments.items()}
        if (reason := self.refusal(**arguments)) is not None:
            report(self, "torch", reason)
            _introduce(type(self), self.config)
            return super().forward(**arguments)
        encoder: Encoder = self._current_engine()
        ids, mask = arguments["input_ids"].to(torch.int64), arguments["attention_mask"]
        output = BaseModelOutput(last_hidden_state=encoder.run(ids, mask))
        return output if _return_dict(self, kwargs.get("return_dict")) else output.to_tuple()


class FastPreTrained(EngineModule):
    """Mixin of a whole Hugging Face model whose encoder stack is a FastEncoder."""

    _stack_class: type[FastEncoder]
    encoder: FastEncoder
    get_output_embeddings: Any
    _shift_right: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.encoder.__class__ = self._stack_class

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: or transformers would not initialise the weights as it does the stock class's."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, engine_options: Any = None, **kwargs: Any) -> Any:
        """As the stock ``from_pretrained``.

        Args:
            engine_options: EngineOptions, a dict of them, or None for the defaults.
        """
        options = EngineOptions.resolve(engine_options)
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
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

    def compile_engine(self) -> None:
        self.encoder.compile_engine()


class FastSeq2SeqLM(FastPreTrained, FastGenerationMixin):
    """Mixin of an encoder-decoder with a language model head."""

    def _decoder_root(self) -> Any:
        """The family's graph module with methods ``cross`` and ``decode``, and its ``shape``."""
        raise NotImplementedError

    def _build_engine(self, target: Target) -> Decoder:
        root = self._decoder_root()
        self._refuse_foreign_parts([root], ignore="shared. encoder.")
        cross = self._engine_for("cross", root, target, "cross", cross_specs(target, root.shape))
        # a head that was replaced may have another size than the config says
        shape = replace(root.shape, vocab_size=self.get_output_embeddings().weight.shape[0])
        model = weakref.proxy(self)  # or each would keep the other, and with it the GPU's memory

        @cache
        def build_decoder(slot_mask: bool, slots: int | None) -> Engine:
            name = "decoder-masked" if slot_mask else "decoder"
            name += "" if slots is None else f"-{slots}"
            specs = decoder_specs(target, shape, slot_mask, slots)
            engine: Engine = model._engine_for(name, model._decoder_root(), target, "decode", specs)
            return engine

        def decoder(slot_mask: bool, slots: int) -> Engine:
            return build_decoder(
                slot_mask or target.always_masked, slots if target.static_slots else None
            )

        options, fused = self.engine_options, None
        if target.device == "cuda" and target.contrib and options.fused_kernels:
            step = self._decoder_root()
            own = dict(self.named_parameters(remove_duplicate=False))
            fused = FusedEngine(step, step.decode, target, own, self._engine_cache())
        if fused is None:  # else it serves long prompts and large batches only, and can wait
            decoder(False, options.min_bucket)
        return Decoder(shape, target, self.device, cross, decoder, fused, options)

    def compile_engine(self) -> None:
        super().compile_engine()
        self._engine.decoder(False, self.engine_options.min_bucket)

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a forward with these arguments goes to torch; None if the engine serves it."""
        if reason := common_refusal(self, kwargs, MODEL_ARGUMENTS):
            return reason
        for name in ("inputs_embeds", "decoder_inputs_embeds"):
            if kwargs.get(name) is not None:
                return Asked(f"{name} are served by torch")
        ids, past = self._decoder_ids(kwargs), kwargs.get("past_key_values")
        past = kwargs.get("cache") if past is None else past
        if ids is None:
            return Asked("no decoder_input_ids: torch reports what is missing")
        if past is not None and not isinstance(past, StaticKVCache):
            kind = type(past).__name__
            return (
                f"past_key_values is a {kind}, not the engine's own KV cache: leave it (and "
                "cache_implementation) out"
            )
        if reason := decoder_mask_refusal(kwargs.get("decoder_attention_mask"), ids, past):
            return reason
        if past is not None and past.bucket is not None:
            if not same_mask(getattr(past, "source_mask", ...), kwargs.get("attention_mask")):
                return "attention_mask is not the one that past_key_values began with"
            if self._engine is not None:  # a further token: all else was looked at with the first
                return self._further_refusal(ids, past.bucket)
        return self._input_refusal(ids, kwargs) or self._engine_refusal(past)

    def _decoder_ids(self, kwargs: dict[str, Any]) -> Any:
        """What the decoder reads: of labels alone, the labels one place later, as in training."""
        ids, labels = kwargs.get("decoder_input_ids"), kwargs.get("labels")
        if ids is None and isinstance(labels, torch.Tensor) and labels.ndim == 2:
            return self._shift_right(labels)
        return ids

    def _further_refusal(self, ids: Any, bucket: Bucket) -> str | None:
        if reason := ids_refusal(self, ids) or self._bucket_refusal(bucket):
            return reason
        if ids is not ... and len(ids) != bucket.size.batch:
            rows = f"{len(ids)} rows, past_key_values {bucket.size.batch}"
            return Asked(f"decoder_input_ids have {rows}")
        return None

    def _input_refusal(self, ids: Any, kwargs: dict[str, Any]) -> str | None:
        """Ranks and sizes that the graphs do not know; many of them torch reports as errors."""
        if reason := ids_refusal(self, ids):
            return reason
        source = kwargs.get("input_ids")
        reason = None
        if (given := kwargs.get("encoder_outputs")) is not None:
            source = given[0]
            reason = hidden_refusal(source, self)
        elif source is not None:  # else before there are any: explain() was asked
            reason = form_refusal("input_ids", source, self)
        if reason or source is None:
            return reason
        if ids is not ... and len(ids) != len(source):
            return Asked(f"decoder_input_ids have {len(ids)} rows, the encoder's {len(source)}")
        size = too_large(self.engine_options, *source.shape[:2])
        return size or mask_refusal(kwargs.get("attention_mask"), source.shape)

    def _engine_refusal(self, past: StaticKVCache | None) -> str | None:
        try:
            self._current_engine()
        except NoEngine as error:
            return str(error)
        bucket = None if past is None else past.bucket
        return None if bucket is None else self._bucket_refusal(bucket)

    def _bucket_refusal(self, bucket: Bucket) -> str | None:
        decoder: Decoder | None = self._engine
        if decoder is None or (bucket.target, bucket.device) == (decoder.target, decoder.device):
            return None
        return "past_key_values was made by another engine"

    @with_signature
    def forward(
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
        arguments = {name: as_torch(value) for name, value in arguments.items()}
        if (reason := self.refusal(**arguments)) is not None:
            report(self, "torch", reason)
            return super().forward(**arguments)
        return self._run(**arguments)

    def _run(
        self,
        decoder_input_ids: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        encoder_outputs: Any,
        past_key_values: StaticKVCache | None,
        use_cache: bool | None,
        labels: torch.Tensor | None,
        cache: StaticKVCache | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """``forward`` on the engine."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        if not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        hidden = encoder_outputs.last_hidden_state
        if use_cache is None:
            use_cache = self.config.use_cache
        given = cache if past_key_values is None else past_key_values
        past = StaticKVCache(self.config.num_decoder_layers) if given is None else given
        ids = self._shift_right(labels) if decoder_input_ids is None else decoder_input_ids
        logits = self._decode(ids, hidden, attention_mask, past)
        output = Seq2SeqLMOutput(
            loss=None if labels is None else _loss(logits, labels),
            logits=logits,
            past_key_values=past if use_cache or given is not None else None,
            encoder_last_hidden_state=hidden,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )
        return output if _return_dict(self, return_dict) else output.to_tuple()

    def _decode(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        past: StaticKVCache,
    ) -> torch.Tensor:
        # refusal() has looked; unless another thread dropped the engine since
        decoder: Decoder = self._engine or self._current_engine()
        length = past.get_seq_length()
        total = length + input_ids.shape[1]
        with decoder.turn():
            if past.bucket is None:
                past.source_mask = mask  # what the bucket's cross-attention mask is made of
            bucket = decoder.enter(past, hidden.detach(), mask, total)
            logits = decoder.run(bucket, input_ids.to(torch.int64), length)
            if logits is bucket.tensors["logits"]:
                logits = logits.clone()  # the next step overwrites the bucket's own
        past.fill(total)
        return logits


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As the stock models: the mean over all labels but -100, from logits [B, Q, V]."""
    labels = labels.to(logits.device).view(-1)
    return torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), labels)


_introduced: set[type] = set()


def _introduce(stack_class: type, config: Any) -> None:
    """Let transformers learn which outputs a stack can record: it does when one is constructed,
    and ours took the place of a stock one (or came out of a pickle)."""
    if stack_class not in _introduced:
        with torch.device("meta"):
            stack_class(config)
        _introduced.add(stack_class)


def _return_dict(module: EngineModule, asked: bool | None) -> bool:
    return bool(module.config.return_dict if asked is None else asked)
