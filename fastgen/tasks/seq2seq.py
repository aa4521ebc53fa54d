"""Encoder-decoder models: which calls the engine serves, and how torch serves the others."""

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from fastgen.engines import NoEngine, too_large
from fastgen.execution.bucket import Bucket
from fastgen.execution.decoder import Decoder
from fastgen.fallback import Asked
from fastgen.generation.explain import OPTIONAL_OUTPUTS
from fastgen.generation.mixin import FastGenerationMixin
from fastgen.graphs.decoder import DecoderRoot
from fastgen.hf import contract, outward
from fastgen.hf.cache import StaticKVCache
from fastgen.hf.forward import StockForward
from fastgen.target import Target
from fastgen.tasks.decoder import FastDecoder, build_decoder, decode, length_refusal
from fastgen.tasks.encoder import FastEncoder
from fastgen.tasks.heads import FastWhole
from fastgen.tasks.outputs import as_stock, wants_dict
from fastgen.tasks.refusals import (
    MODEL_ARGUMENTS,
    bucket_refusal,
    common_refusal,
    decoder_mask_refusal,
    foreign_refusal,
    form_refusal,
    hidden_refusal,
    ids_refusal,
    mask_refusal,
    rows_refusal,
    same_mask,
    states_wanted,
)


class FastSeq2SeqLM(StockForward, FastWhole, FastGenerationMixin):
    """Mixin of an encoder-decoder with a language model head."""

    explain = FastGenerationMixin.explain  # of generate; explain_forward is of forward

    _inside = ""
    """Path of the module that holds the stacks and the shared embedding, with a dot behind it."""
    _shifts_sources = False
    """Whether ``forward`` without tokens for the decoder gives it the encoder's, shifted by one."""
    prepare_decoder_input_ids_from_labels: Any

    @property
    def _encoder(self) -> FastEncoder:
        encoder: FastEncoder = attrgetter(f"{self._inside}encoder")(self)
        return encoder

    @property
    def _decoder(self) -> FastDecoder:
        decoder: FastDecoder = attrgetter(f"{self._inside}decoder")(self)
        return decoder

    def _decoder_root(self) -> DecoderRoot:
        """The family's decoder and its head."""
        raise NotImplementedError

    def _build_engine(self, target: Target) -> Decoder:
        root = self._decoder_root()
        inside = self._inside
        self._refuse_foreign_parts([root], ignore=f"{inside}shared. {inside}encoder.")
        # a head that was replaced may have another size than the config says
        vocabulary = self.get_output_embeddings().weight.shape[0]
        shape = replace(root.shape, vocab_size=vocabulary, positions=self._decoder.positions)
        return build_decoder(self, target, shape, "decoder")

    def _new_cache(self) -> StaticKVCache:
        return StaticKVCache(*contract.cache_layers(self.config), dtype=self.dtype)

    def _encoded(self, ids: torch.Tensor, mask: torch.Tensor | None, config: Any) -> torch.Tensor:
        given = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        given |= {name: getattr(config, name) for name in OPTIONAL_OUTPUTS}
        if (hidden := self._encoder.hidden(**given)) is None:  # torch serves it, or reports
            hidden = self._encoder(return_dict=True, **given)[0]
        return hidden

    def _called(self) -> tuple[type, ...]:
        return FastEncoder, FastWhole  # the decoder stack is part of the graph

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
        ids, past = self._decoder_ids(kwargs), contract.given_cache(kwargs)
        if ids is None:
            return Asked("no decoder_input_ids: torch reports what is missing")
        if reason := foreign_refusal(past, StaticKVCache):
            return reason
        if reason := decoder_mask_refusal(kwargs.get("decoder_attention_mask"), ids, past):
            return reason
        if reason := length_refusal(self._decoder, ids, past):
            return reason
        if past is not None and past.bucket is not None:
            if not same_mask(getattr(past, "source_mask", ...), kwargs.get("attention_mask")):
                return f"attention_mask is not the one that {contract.CACHE} began with"
            if self._goes_on():  # a further token: all else was looked at with the first
                return self._further_refusal(ids, past.bucket)
        return self._input_refusal(ids, kwargs) or self._engine_refusal(past)

    def _decoder_ids(self, kwargs: dict[str, Any]) -> Any:
        """What the decoder reads: of labels alone, the labels one place later, as in training."""
        if (ids := kwargs.get("decoder_input_ids")) is not None:
            return ids
        tokens = kwargs.get("labels")
        if tokens is None and self._shifts_sources:
            tokens = kwargs.get("input_ids")
        if isinstance(tokens, torch.Tensor) and tokens.ndim == 2:
            return self.prepare_decoder_input_ids_from_labels(tokens)
        return None

    def _further_refusal(self, ids: Any, bucket: Bucket) -> str | None:
        if reason := ids_refusal(self, ids) or self._bucket_refusal(bucket):
            return reason
        return rows_refusal(ids, bucket)

    def _input_refusal(self, ids: Any, kwargs: dict[str, Any]) -> str | None:
        """Ranks and sizes that the graphs do not know; many of them torch reports as errors."""
        if reason := ids_refusal(self, ids):
            return reason
        source = kwargs.get("input_ids")
        reason = None
        if (given := kwargs.get("encoder_outputs")) is not None:
            source = given[0]
            reason = hidden_refusal("encoder_outputs", source, self)
        elif source is not None:  # else before there are any: explain() was asked
            reason = form_refusal("input_ids", source, self)
        if reason or source is None or source is ...:
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
        return None if decoder is None else bucket_refusal(decoder, bucket)

    def _by_torch(self, **arguments: Any) -> Any:
        if isinstance(encoded := arguments.get("encoder_outputs"), BaseModelOutput):
            hidden = outward.as_torch_reads(self, encoded.last_hidden_state)
            arguments["encoder_outputs"] = BaseModelOutput(
                **{**encoded, "last_hidden_state": hidden}
            )
        return super()._by_torch(**arguments)

    def _run(
        self,
        decoder_input_ids: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """``forward`` on the engine."""
        # refusal() has looked; unless another thread dropped the engine since
        decoder: Decoder = self._engine or self._current_engine()
        asked = {k: value for k, value in kwargs.items() if k == "output_hidden_states"}
        if encoder_outputs is None:
            source = {"input_ids": input_ids, "attention_mask": attention_mask}
            with outward.within(self._encoder):
                encoder_outputs = self._encoder(**source, **asked)
        if not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        hidden = encoder_outputs.last_hidden_state
        if use_cache is None:
            use_cache = self.config.use_cache
        given = contract.given_cache(kwargs)
        past = given
        if past is None:
            past = StaticKVCache(decoder.shape.layers, dtype=self.dtype)
        wanted = states_wanted(self._decoder, asked)
        tokens = {"decoder_input_ids": decoder_input_ids, "labels": labels, "input_ids": input_ids}
        ids = self._decoder_ids(tokens)
        logits, states = decode(decoder, ids, hidden, attention_mask, past, wanted)
        output = Seq2SeqLMOutput(
            loss=None if labels is None else outward.given(self, _loss(logits, labels)),
            logits=outward.given(self, logits),
            decoder_hidden_states=as_stock(self._decoder, states) if wanted else None,
            encoder_last_hidden_state=outward.rounded(self, hidden),
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **{contract.CACHE: past if use_cache or given is not None else None},
        )
        return output if wants_dict(self, return_dict) else output.to_tuple()


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As the stock models: the mean over all labels but -100, from logits [B, Q, V]."""
    labels = labels.to(logits.device).view(-1)
    return torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), labels)
