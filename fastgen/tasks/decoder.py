"""A decoder that attends to an encoder: which calls of its stack the engine serves, and how."""

import weakref
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
)

from fastgen.engines import Engine, NoEngine, too_large
from fastgen.engines.fused.engine import FusedEngine
from fastgen.execution.bucket import Bucket, BucketSize
from fastgen.execution.decoder import Decoder
from fastgen.fallback import Asked
from fastgen.graphs.decoder import DecoderRoot, decoder_specs
from fastgen.graphs.shape import Shape
from fastgen.graphs.source import cross_specs
from fastgen.hf import contract, outward
from fastgen.hf.cache import StaticKVCache
from fastgen.hf.forward import StockForward
from fastgen.hf.module import EngineModule
from fastgen.target import Target
from fastgen.tasks.outputs import as_stock, introduce, wants_dict
from fastgen.tasks.refusals import (
    DECODER_ARGUMENTS,
    bucket_refusal,
    common_refusal,
    decoder_mask_refusal,
    foreign_refusal,
    hidden_refusal,
    ids_refusal,
    mask_refusal,
    rows_refusal,
    same_mask,
    states_wanted,
)


class FastDecoder(StockForward, EngineModule):
    """Mixin of a decoder stack that attends to an encoder: token ids in, hidden states out.

    For programs, and stock heads, that call a model's decoder themselves. Whole models with a
    head have an engine of their own; a KV cache may go from one to the other.
    """

    _waits = True
    attends = True

    @property
    def positions(self) -> int | None:
        """How many tokens a row may have; None if a position is no place in a table."""
        return None

    @classmethod
    def is_of(cls, part: Any) -> bool:
        """Whether a part of the stock class is a decoder: it may be of one class with encoders."""
        return bool(getattr(part, "is_decoder", True))

    def _decoder_root(self) -> DecoderRoot:
        """The family's decoder without its head."""
        raise NotImplementedError

    def _build_engine(self, target: Target) -> Decoder:
        if target.static_slots:
            raise NoEngine(f"a decoder without its head is not compiled by {target.backend}")
        root = self._decoder_root()
        self._refuse_foreign_parts([root], ignore="")
        shape = replace(root.shape, positions=self.positions)
        return build_decoder(self, target, shape, "decoder-stack")

    def compile_engine(self) -> None:
        """Build the engine now (and store it in the engine cache), not at the first call."""
        self._current_engine()

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a call with these arguments goes to torch; None if the engine serves it."""
        if reason := common_refusal(self, kwargs, DECODER_ARGUMENTS):
            return reason
        ids, source = kwargs.get("input_ids"), kwargs.get("encoder_hidden_states")
        if ids is None or kwargs.get("inputs_embeds") is not None:
            return Asked("inputs_embeds are served by torch")
        if source is None:
            return Asked("no encoder_hidden_states to attend to")
        past = contract.given_cache(kwargs)
        if reason := foreign_refusal(past, StaticKVCache):
            return reason
        if reason := decoder_mask_refusal(kwargs.get("attention_mask"), ids, past):
            return reason
        if reason := length_refusal(self, ids, past):
            return reason
        if past is not None and past.bucket is not None:
            if not same_mask(
                getattr(past, "source_mask", ...), kwargs.get("encoder_attention_mask")
            ):
                return f"encoder_attention_mask is not the one that {contract.CACHE} began with"
            if self._goes_on():  # a further token: all else was looked at with the first
                return rows_refusal(ids, past.bucket) or self._bucket_refusal(ids, past.bucket)
        return self._input_refusal(kwargs) or self._engine_refusal(past)

    def _input_refusal(self, kwargs: dict[str, Any]) -> str | None:
        ids, source = kwargs["input_ids"], kwargs["encoder_hidden_states"]
        refused = ids_refusal(self, ids) or hidden_refusal("encoder_hidden_states", source, self)
        if refused or source is ...:
            return refused  # or explain() was asked
        if ids is not ... and len(ids) != len(source):
            return Asked(f"input_ids have {len(ids)} rows, the encoder's {len(source)}")
        size = too_large(self.engine_options, *source.shape[:2])
        return size or mask_refusal(kwargs.get("encoder_attention_mask"), source.shape)

    def _engine_refusal(self, past: StaticKVCache | None) -> str | None:
        try:
            decoder = self._current_engine()
        except NoEngine as error:
            return str(error)
        bucket = None if past is None else past.bucket
        return None if bucket is None else bucket_refusal(decoder, bucket)

    def _bucket_refusal(self, ids: Any, bucket: Bucket) -> str | None:
        decoder: Decoder | None = self._engine
        found = None if decoder is None else bucket_refusal(decoder, bucket)
        return ids_refusal(self, ids) or found

    def _by_torch(self, **arguments: Any) -> Any:
        introduce(type(self), self.config)
        return super()._by_torch(**arguments)

    def _run(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """``forward`` on the engine."""
        # refusal() has looked; unless another thread dropped the engine since
        decoder: Decoder = self._engine or self._current_engine()
        given, wanted = contract.given_cache(kwargs), states_wanted(self, kwargs)
        past = given
        if past is None:
            past = StaticKVCache(decoder.shape.layers, dtype=self.dtype)
        keep = self.config.use_cache if use_cache is None else use_cache
        source = encoder_hidden_states, encoder_attention_mask
        hidden, states = decode(decoder, input_ids, *source, past, wanted)
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=outward.given(self, hidden),
            hidden_states=as_stock(self, states) if wanted else None,
            **{contract.CACHE: past if keep or given is not None else None},
        )
        return output if wants_dict(self, return_dict) else output.to_tuple()


def build_decoder(module: Any, target: Target, shape: Shape, name: str) -> Decoder:
    """The decoder over the parameters of a module that has a ``_decoder_root``.

    Args:
        name: of its decoder graphs.
    """
    root, options = module._decoder_root(), module.engine_options
    cross = None
    if shape.source:
        cross = module._engine_for("cross", root, target, "cross", cross_specs(target, shape))
    model = weakref.proxy(module)  # or each would keep the other, and with it the GPU's memory

    @cache
    def build(slot_mask: bool, slots: int | None, states: bool) -> Engine:
        title = name + "-masked" * slot_mask + "-states" * states
        title += "" if slots is None else f"-{slots}"
        specs = decoder_specs(target, shape, slot_mask, slots, states)
        engine: Engine = model._engine_for(title, model._decoder_root(), target, "decode", specs)
        return engine

    def decoder(slot_mask: bool, slots: int, states: bool = False) -> Engine:
        count = slots if target.static_slots else None
        return build(slot_mask or target.always_masked, count, states)

    fused = None
    if shape.vocab_size is not None and target.contrib and options.fused_kernels:
        fused = _fused_engine(module, target, shape)
    if fused is None:  # else it serves long prompts and large batches only, and can wait
        decoder(False, options.min_bucket)
    return Decoder(shape, target, module.device, cross, decoder, fused, options)


def _fused_engine(module: Any, target: Target, shape: Shape) -> FusedEngine | None:
    """What runs most steps on a GPU, and prompts of a decoder without a source."""
    module._unfused = None
    if target.device != "cuda":
        return None
    step, own = module._decoder_root(), module._weights(target)
    held = module._held_for_kernels(own, step)
    fused = FusedEngine(step, target, own, module._engine_cache(), held)
    keeps = module.engine_options.keep_torch_weights
    if held or (target.weights != "full" and not keeps):
        size = BucketSize(1, 1, module.engine_options.min_bucket, 1 if shape.source else 0)
        reason = fused.make_weights(Bucket(shape, target, module.device, size).tensors)
        if held and reason:
            module._unfused = reason
            return None
    return fused


def decode(
    decoder: Decoder,
    input_ids: torch.Tensor,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    past: StaticKVCache,
    states: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Append tokens [B, Q] to a KV cache: what the decoder gives for them, and its hidden states.

    Args:
        hidden: encoder hidden states [B, S, E].
        mask: [B, S] of 1 (source token) and 0 (padding), or None.
        states: whether hidden states are wanted: none otherwise.
    """
    length = past.get_seq_length()
    total = length + input_ids.shape[1]
    ids = input_ids.to(torch.int64)
    found: list[torch.Tensor] = []
    with decoder.turn():
        if past.bucket is None:
            past.source_mask = mask  # what the bucket's cross-attention mask is made of
        bucket = decoder.enter(past, hidden.detach(), mask, total)
        if states:
            output, found = decoder.run_with_states(bucket, ids, length)
        else:
            output = decoder.run(bucket, ids, length)
        if output is bucket.tensors[decoder.shape.output[0]]:
            output = output.clone()  # the next step overwrites the bucket's own
        decoder.hand_over(output, *found)
    past.fill(total)
    return output, found


def length_refusal(decoder: FastDecoder, ids: Any, past: StaticKVCache | None) -> str | None:
    """Why torch must see tokens [B, Q] behind those of a KV cache: that they are too many."""
    known = decoder.positions
    if known is None or not isinstance(ids, torch.Tensor) or not ids.ndim:
        return None
    total = ids.shape[-1] + (0 if past is None else past.get_seq_length())
    return None if total <= known else Asked(f"{total} tokens: the decoder knows {known} positions")
