"""The fast loop for beam search and beam sampling.

The slow reference is transformers' ``_beam_search``; what it does with scores is in ``advance.py``.
"""

from typing import Any

import torch
from transformers.generation.utils import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
)

from fastgen.generation.advance import Advance, candidates, show_ancestors
from fastgen.generation.call import Call, keeps, records
from fastgen.generation.loop import Loop
from fastgen.generation.state import BeamState
from fastgen.hf import contract
from fastgen.hf.cache import LeasedCache, unshared


class BeamLoop(Loop):
    """One ``_beam_search`` call."""

    def __init__(self, call: Call) -> None:
        beams = call.config.num_beams
        super().__init__(call, call.input_ids.shape[0] // beams, beams)

    def _make_state(self, batch: int, capacity: int) -> BeamState:
        return BeamState(batch, self.beams, capacity, self.call.decoder.device)

    def _prefill(self) -> None:
        """All prompt tokens but the last: at once where beams share them, else one step each, in
        which every beam gets its copy."""
        bucket, prompt = self.bucket, self.call.prompt
        show_ancestors(self.state, bucket)
        if bucket.prefix:
            self.call.decoder.prefill(bucket, self.state.running[:, 0, : bucket.prefix])
            bucket.tensors["input_ids"].copy_(self.state.running[:, :, bucket.prefix])
            bucket.seek(bucket.prefix)
            return
        for position in range(prompt):
            bucket.tensors["input_ids"].copy_(self.state.running[:, :, position])
            bucket.seek(position)
            if position < prompt - 1:
                self.call.decoder.step(bucket)()

    def _grow(self) -> None:
        super()._grow()
        show_ancestors(self.state, self.bucket)

    def _eager(self) -> Advance:
        """Step, then choose with the installed processors as transformers calls them."""
        call, state, length = self.call, self.state, self.length
        call.decoder.step(self.bucket)()
        if len(call.processors):
            ids = state.running.view(-1, state.capacity)[:, :length].contiguous()
            advance = Advance(call, state, self.bucket, lambda scores: call.processors(ids, scores))
        else:
            advance = self._once_a_bucket(lambda: Advance(call, state, self.bucket, None))
        advance.length = length
        if keeps(call, "output_scores"):
            advance.recorded_scores = tuple(self.scores)
        advance()
        return advance

    def _captured(self, phase: tuple[bool, ...]) -> Advance:
        """Step and choice as one graph replay, captured on first use of its bucket and phase."""
        call, state, bucket = self.call, self.state, self.bucket
        config = call.config

        def make_after() -> Advance:
            buffers = bucket.without_steps()
            if not self.plan.processors:
                return Advance(call, state, buffers, None, self._draws())
            flat = state.running.view(-1, state.capacity)
            places = torch.arange(state.capacity, device=flat.device)

            def as_set() -> torch.Tensor:
                return torch.where(places < state.index, flat, flat[:, :1])

            process = self.plan.process(flat[:, : self.length], as_set)
            return Advance(call, state, buffers, process, self._draws())

        settings = (config.do_sample, config.early_stopping, candidates(call), records(call))
        step = call.decoder.step_with(
            bucket,
            key=("beams", state, bucket.prefix > 0, settings, self.plan.signature, phase),
            make_after=make_after,
            mutable=[*state.mutable(), bucket.tensors["slot_mask"]],
        )
        return self._replay(step)

    def _finished(self) -> bool:
        """Whether to stop before the next token; waits only for tokens of a while ago."""
        if self.length == self.call.prompt:
            return False
        if self.length >= self.call.limit:
            return True
        if self.call.waits or self.call.config.return_dict_in_generate:
            return bool(self.state.done)  # the KV cache to return is that of the last token
        return self._wait() and bool(self.state.seen)

    def _stopped(self) -> bool:
        return bool(self.state.done)

    def _output(self) -> Any:
        call, state = self.call, self.state
        kept = call.config.num_return_sequences
        steps = int(state.steps)
        self._undo(self.length - call.prompt - steps)
        parents = state.parents[:, :kept].flatten(0, 1)
        new = int((parents + 1).bool().sum(dim=1).max())
        sequences = state.sequences[:, :kept].flatten(0, 1)[:, : call.prompt + new].clone()
        if not call.config.return_dict_in_generate:
            return sequences
        scores = state.scores[:, :kept].flatten(0, 1).clone()
        kind: Any = GenerateBeamEncoderDecoderOutput
        if call.hidden is None:
            kind = GenerateBeamDecoderOnlyOutput
        return kind(
            sequences=sequences,
            sequences_scores=scores if call.config.output_scores else None,
            scores=tuple(self.scores[:steps]) if keeps(call, "output_scores") else None,
            logits=tuple(self.logits[:steps]) if keeps(call, "output_logits") else None,
            beam_indices=parents[:, :new].clone(),
            **{contract.CACHE: self._cache(call.prompt + steps - 1)},
        )

    def _cache(self, length: int) -> LeasedCache:
        """The running beams' keys and values as a Hugging Face cache: a row per beam."""
        state, bucket = self.state, self.bucket
        places = torch.arange(length, device=bucket.device)
        behind = bucket.prefix + (places - bucket.prefix) * self.beams
        behind = behind + state.ancestors[:, :, :length]  # [B, N, length]
        slots = torch.where(places < bucket.prefix, places, behind)
        cache: Any = self.call.cache
        if self.hidden is None:
            return unshared(bucket, slots, cache.dtype, 0)
        listed = len(cache.self_attention_cache.layers)
        return unshared(bucket, slots, cache.dtype, self.hidden.shape[1], listed)


def beam_search(call: Call) -> Any:
    """Serve ``_beam_search``: beam search, or beam sampling if ``config.do_sample``."""
    return BeamLoop(call).run()
