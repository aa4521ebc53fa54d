"""Decoder-only models: which calls the engine serves, and how torch serves the others."""

from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastgen.engines import NoEngine
from fastgen.execution.bucket import Bucket
from fastgen.execution.decoder import Decoder, row_starts
from fastgen.fallback import Asked
from fastgen.generation.mixin import FastGenerationMixin
from fastgen.hf import contract, outward
from fastgen.hf.cache import LeasedCache, StaticDecoderCache
from fastgen.hf.forward import StockForward
from fastgen.hf.loading import FastPreTrained
from fastgen.target import Target
from fastgen.tasks.decoder import build_decoder
from fastgen.tasks.outputs import as_stock, wants_dict
from fastgen.tasks.refusals import (
    CAUSAL_ARGUMENTS,
    bucket_refusal,
    common_refusal,
    foreign_refusal,
    ids_refusal,
    left_mask_refusal,
    positions_refusal,
    states_wanted,
)


class FastCausalLM(StockForward, FastPreTrained, FastGenerationMixin):
    """Mixin of a decoder without an encoder, with a language model head."""

    explain = FastGenerationMixin.explain  # of generate; explain_forward is of forward

    _reads = "input_ids"
    _by_any_loop = ("position_ids", "logits_to_keep")
    _output: Any = CausalLMOutputWithPast
    """What the stock ``forward`` returns."""
    _position_table: str | None = None
    """Path of the embedding of positions, if there is one."""
    loss_function: Any

    def _decoder_root(self) -> Any:
        """The family's graph module, a ``DecoderRoot``."""
        raise NotImplementedError

    def _build_engine(self, target: Target) -> Decoder:
        if target.static_slots:
            raise NoEngine(f"models without an encoder are not compiled by {target.backend}")
        root = self._decoder_root()
        self._refuse_foreign_parts([root], ignore="")
        # a head that was replaced may have another size than the config says
        vocabulary = self.get_output_embeddings().weight.shape[0]
        shape = replace(root.shape, vocab_size=vocabulary, positions=self._known_positions())
        return build_decoder(self, target, shape, "decoder")

    def _known_positions(self) -> int | None:
        """Rows of the embedding of positions, whatever the config says of them."""
        if self._position_table is None:
            return None
        table: Any = self.get_submodule(self._position_table)
        return int(table.weight.shape[0])

    def _new_cache(self) -> StaticDecoderCache:
        return StaticDecoderCache(self.config.num_hidden_layers, self.dtype)

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a forward with these arguments goes to torch; None if the engine serves it."""
        if reason := common_refusal(self, kwargs, CAUSAL_ARGUMENTS):
            return reason
        if kwargs.get("inputs_embeds") is not None:
            return Asked("inputs_embeds are served by torch")
        ids, past = kwargs.get("input_ids"), contract.given_cache(kwargs)
        if ids is None:
            return Asked("no input_ids: torch reports what is missing")
        if reason := foreign_refusal(past, LeasedCache):
            return reason
        last = kwargs.get("logits_to_keep", 0)
        if not isinstance(last, int) or last < 0:
            return "logits_to_keep is no number of last tokens"
        if reason := ids_refusal(self, ids) or self._place_refusal(ids, past, kwargs):
            return reason
        bucket = None if past is None else past.bucket
        if bucket is not None and self._goes_on():  # all else was looked at with the first token
            return self._bucket_refusal(ids, bucket)
        try:
            self._current_engine()
        except NoEngine as error:
            return str(error)
        return None if bucket is None else self._bucket_refusal(ids, bucket)

    def _place_refusal(self, ids: Any, past: Any, kwargs: dict[str, Any]) -> str | None:
        """Masks and positions other than those of rows padded on the left."""
        length = 0 if past is None else past.get_seq_length()
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if ids is ...:  # explain() asks
            shape = None if mask is None else mask.shape
        else:
            shape = torch.Size((len(ids), length + ids.shape[1]))
        if reason := left_mask_refusal(mask, shape):
            return reason
        if shape is None:
            return None
        starts = None if mask is None else row_starts(mask)
        if reason := positions_refusal(positions, starts, shape, length):
            return reason
        known, last = self._known_positions(), shape[1]
        if known is not None and last > known and last - int(_least(starts)) > known:
            return Asked(f"{last} tokens: the model knows {known} positions")
        return None

    def _bucket_refusal(self, ids: Any, bucket: Bucket) -> str | None:
        decoder: Decoder | None = self._engine
        if ids is not ... and len(ids) != bucket.size.batch:
            return Asked(f"input_ids have {len(ids)} rows, {contract.CACHE} {bucket.size.batch}")
        return None if decoder is None else bucket_refusal(decoder, bucket)

    def _first_call(self, given: dict[str, Any]) -> dict[str, Any]:
        """As ``generate`` hands it on: of tokens that the KV cache holds, those behind them."""
        ids = given.pop("inputs", given.get("input_ids"))
        past, mask = contract.given_cache(given), given.get("attention_mask")
        held = 0 if past is None else past.get_seq_length()
        if isinstance(ids, torch.Tensor) and held and (mask is None or mask.shape == ids.shape):
            ids = ids[:, held:]
        given["input_ids"] = ... if ids is None else ids
        positions = given.get("position_ids")
        if positions is None and isinstance(mask, torch.Tensor):
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if isinstance(positions, torch.Tensor) and isinstance(ids, torch.Tensor):
            positions = positions[..., -ids.shape[-1] :]
        given["position_ids"] = positions
        return given

    def _run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """``forward`` on the engine."""
        # refusal() has looked; unless another thread dropped the engine since
        decoder: Decoder = self._engine or self._current_engine()
        given, wanted = contract.given_cache(kwargs), states_wanted(self, kwargs)
        past = self._new_cache() if given is None else given
        logits, states = _decode(decoder, input_ids, attention_mask, past, wanted, logits_to_keep)
        loss = None
        if labels is not None:
            of_loss = {n: kwargs[n] for n in ("num_items_in_batch",) if n in kwargs}
            vocabulary = self.config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=vocabulary, **of_loss)
        keep = self.config.use_cache if use_cache is None else use_cache
        output = self._output(
            loss=loss,
            logits=outward.given(self, logits),
            hidden_states=as_stock(self, states) if wanted else None,
            **{contract.CACHE: past if keep else None},
        )
        return output if wants_dict(self, return_dict) else output.to_tuple()


def _decode(
    decoder: Decoder,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    past: Any,
    states: bool,
    last: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Append tokens [B, Q] to a KV cache: logits of all of them, or of the ``last``, and if they
    are wanted their hidden states."""
    length, (batch, queries) = past.get_seq_length(), input_ids.shape
    total, ids = length + queries, input_ids.to(torch.int64)
    found: list[torch.Tensor] = []
    with decoder.turn():
        starts = None if mask is None else row_starts(mask)
        bucket = decoder.enter_rows(past, batch, starts, total)
        given = min(last or queries, queries)
        if states:
            output, found = decoder.run_with_states(bucket, ids, length, given)
        else:
            output = decoder.run(bucket, ids, length, given)
        if output is bucket.tensors["logits"]:
            output = output.clone()  # the next step overwrites the bucket's own
        decoder.hand_over(output, *found)
    past.fill(total)
    return output, found


def _least(starts: torch.Tensor | None) -> Any:
    return 0 if starts is None else starts.min()
