"""Encoder-decoder models: which calls the engine serves, and how torch serves the others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from fastgen.decoder import Decoder
from fastgen.engines import NoEngine, too_large
from fastgen.engines.fused import FusedEngine
from fastgen.generation import FastGenerationMixin
from fastgen.hf import contract
from fastgen.hf.forward import forward_like
from fastgen.kv_cache import Bucket, StaticKVCache
from fastgen.modeling import EngineModule, stock_class
from fastgen.options import EngineOptions
from fastgen.refusals import common_refusal, ids_refusal, mask_refusal, same_mask, states_wanted
from fastgen.stacks import (
    FastDecoder,
    FastEncoder,
    as_stock,
    bucket_refusal,
    build_decoder,
    decode,
    rows_refusal,
    wants_dict,
)
from fastgen.target import Target

# What a whole model's own code does not hand on to its stacks under this name
_OF_THE_WHOLE: tuple[str, ...] = (
    *("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"),
    *("encoder_outputs", "inputs_embeds", "decoder_inputs_embeds", "use_cache", contract.CACHE),
    *("labels", "start_positions", "end_positions"),
)


def _is_ours(fast: type) -> bool:
    """Whether fastgen defines a class; a program's own subclass is known by its own name."""
    return fast.__module__.partition(".")[0] == "fastgen"


class FastPreTrained(EngineModule):
    """Mixin of a whole Hugging Face model whose stacks are Fast ones.

    Programs that write down a model's class, to load it again later, find the stock one: a class
    of fastgen has the stock class's ``__name__``, and its models that one's ``__module__``. What
    they wrote loads without fastgen too. Pickles go by ``__qualname__``, which is its own.
    """

    _stacks: tuple[type[FastEncoder], type[FastDecoder]]
    get_output_embeddings: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _is_ours(cls) and issubclass(cls, PreTrainedModel):
            cls.__name__ = stock_class(cls).__name__

    def __init__(
        self,
        config: Any,
        *args: Any,
        engine_options: EngineOptions | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As the stock constructor.

        Args:
            engine_options: EngineOptions, a dict of them, or None for the defaults.

        Raises:
            OptionError: an option that does not exist, or a value that is not allowed.
        """
        options = None if engine_options is None else EngineOptions.resolve(engine_options)
        super().__init__(config, *args, **kwargs)
        for part in self.modules():
            if type(part) is stock_class(self._stacks[0]):
                part.__class__ = self._stacks[bool(part.is_decoder)]
        if _is_ours(type(self)):
            self.__module__ = stock_class(type(self)).__module__
        if options is not None:
            self.engine_options = options

    def __repr__(self) -> str:
        """As the stock class's, under the Fast class's own name."""
        return type(self).__qualname__ + super().__repr__().removeprefix(self._get_name())

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: or transformers would not initialise the weights as it does the stock class's."""
        return False

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        engine_options: EngineOptions | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """As the stock ``from_pretrained``.

        Args:
            engine_options: as in the constructor.
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

    def _fast_stacks(self) -> list[FastEncoder | FastDecoder]:
        return [part for part in self.modules() if isinstance(part, FastEncoder | FastDecoder)]

    def stacks_refusal(self, **kwargs: Any) -> str | None:
        """Why torch runs a stack in a stock forward with these arguments; None if engines serve
        them all."""
        others = {name: value for name, value in kwargs.items() if name not in _OF_THE_WHOLE}
        encoded, ids = kwargs.get("encoder_outputs"), kwargs.get("decoder_input_ids")
        for stack in self._fast_stacks():
            if isinstance(stack, FastDecoder):
                call = {
                    # heads that get no tokens for it shift the encoder's
                    "input_ids": kwargs.get("input_ids") if ids is None else ids,
                    "attention_mask": kwargs.get("decoder_attention_mask"),
                    "inputs_embeds": kwargs.get("decoder_inputs_embeds"),
                    "encoder_hidden_states": ... if encoded is None else encoded[0],
                    "encoder_attention_mask": kwargs.get("attention_mask"),
                    contract.CACHE: contract.given_cache(kwargs),
                }
            elif encoded is None:
                names = "input_ids", "attention_mask", "inputs_embeds"
                call = {name: kwargs.get(name) for name in names}
            else:
                continue
            if reason := stack.refusal(**call, **others):
                return reason
        return None


class FastTask(FastPreTrained):
    """Mixin of a whole model whose own code is the stock class's: its stacks do the work."""

    def compile_engine(self) -> None:
        """Build the engines of all stacks now (and store them in the engine cache)."""
        for stack in self._fast_stacks():
            stack.compile_engine()

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a forward with these arguments goes to torch, in part at least; None if the engines
        serve both stacks."""
        return self.stacks_refusal(**kwargs)


class FastSeq2SeqLM(FastPreTrained, FastGenerationMixin):
    """Mixin of an encoder-decoder with a language model head."""

    explain = FastGenerationMixin.explain  # of generate; explain_forward is of forward

    encoder: FastEncoder
    decoder: FastDecoder
    forward: Any

    def _decoder_root(self) -> Any:
        """The family's graph module with methods ``cross`` and ``decode``, and its ``shape``."""
        raise NotImplementedError

    def _build_engine(self, target: Target) -> Decoder:
        root = self._decoder_root()
        self._refuse_foreign_parts([root], ignore="shared. encoder.")
        # a head that was replaced may have another size than the config says
        shape = replace(root.shape, vocab_size=self.get_output_embeddings().weight.shape[0])
        fused = None
        if target.device == "cuda" and target.contrib and self.engine_options.fused_kernels:
            step = self._decoder_root()
            own = dict(self.named_parameters(remove_duplicate=False))
            fused = FusedEngine(step, step.decode, target, own, self._engine_cache())
        return build_decoder(self, target, shape, "decoder", fused)

    def _called(self) -> tuple[type, ...]:
        return FastEncoder, FastPreTrained  # the decoder stack is part of the graph

    def compile_engine(self) -> None:
        super().compile_engine()
        self._engine.decoder(False, self.engine_options.min_bucket)

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a forward with these arguments goes to torch; None if the engine serves it."""
        if reason := common_refusal(self, kwargs):
            return reason
        for name in ("inputs_embeds", "decoder_inputs_embeds", "labels"):
            if kwargs.get(name) is not None:
                return f"{name} are served by torch"
        if kwargs.get("decoder_input_ids") is None:
            return "no decoder_input_ids: torch reports what is missing"
        mask = kwargs.get("decoder_attention_mask")
        if mask is not None and (mask.ndim != 2 or not bool(mask.all())):
            return "decoder_attention_mask hides tokens"
        past = contract.given_cache(kwargs)
        if past is not None and not isinstance(past, StaticKVCache):
            return f"{contract.CACHE} is a {type(past).__name__}, not the engine's own KV cache"
        if past is not None and past.bucket is not None:
            if not same_mask(getattr(past, "source_mask", ...), kwargs.get("attention_mask")):
                return f"attention_mask is not the one that {contract.CACHE} began with"
            if self._goes_on():  # a further token: all else was looked at with the first
                return self._further_refusal(kwargs["decoder_input_ids"], past.bucket)
        return self._input_refusal(kwargs) or self._engine_refusal(past)

    def _further_refusal(self, ids: Any, bucket: Bucket) -> str | None:
        if reason := rows_refusal(ids, bucket):
            return reason
        return ids_refusal(self, ids) or self._bucket_refusal(bucket)

    def _input_refusal(self, kwargs: dict[str, Any]) -> str | None:
        """Ranks and sizes that the graphs do not know; many of them torch reports as errors."""
        ids, source = kwargs["decoder_input_ids"], kwargs.get("encoder_outputs")
        if reason := ids_refusal(self, ids):
            return reason
        source = kwargs.get("input_ids") if source is None else source[0]
        if source is None:
            return None  # before there are any: explain() was asked
        if source.requires_grad and torch.is_grad_enabled():
            return "gradients of encoder_outputs may be asked for"
        if isinstance(ids, torch.Tensor) and len(ids) != len(source):
            return f"decoder_input_ids have {len(ids)} rows, the encoder's {len(source)}"
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if FastSeq2SeqLM in cls.__bases__:  # a class of ours, not a program's own
            cls.forward = forward_like(stock_class(cls).forward)

    def _forward(self, **arguments: Any) -> Any:
        if self.refusal(**arguments) is not None:
            return super().forward(**arguments)
        return self._run(**arguments)

    def _run(
        self,
        decoder_input_ids: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """``forward`` on the engine."""
        # refusal() has looked; unless another thread dropped the engine since
        decoder: Decoder = self._engine or self._current_engine()
        asked = {k: value for k, value in kwargs.items() if k == "output_hidden_states"}
        if encoder_outputs is None:
            source = {"input_ids": input_ids, "attention_mask": attention_mask}
            encoder_outputs = self.encoder(**source, **asked)
        if not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        hidden = encoder_outputs.last_hidden_state
        if use_cache is None:
            use_cache = self.config.use_cache
        given = contract.given_cache(kwargs)
        past = StaticKVCache(self.config.num_decoder_layers) if given is None else given
        wanted = states_wanted(self.decoder, asked)
        call = decoder_input_ids, hidden, attention_mask, past
        logits, states = decode(decoder, *call, wanted)
        output = Seq2SeqLMOutput(
            logits=logits,
            decoder_hidden_states=as_stock(self.decoder, states) if wanted else None,
            encoder_last_hidden_state=hidden,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **{contract.CACHE: past if use_cache or given is not None else None},
        )
        return output if wants_dict(self, return_dict) else output.to_tuple()
