"""What follows a step of beam search: the choice of the next beams, and each beam's mask.

The slow reference is transformers' ``_beam_search``; the bookkeeping here is the same arithmetic in
the same order over tensors of one shape for every token, so that it can be captured with the step.

Beams of one row share its KV buffer and its source: they are query tokens of one sequence, and a
mask over slots shows each beam its own ancestors. Nothing is ever reordered.

Axes: B rows, N beams, C candidates kept, V vocabulary, T capacity in tokens, P cached positions.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastgen.execution.bucket import Bucket
from fastgen.generation import cpu
from fastgen.generation.call import Call, records
from fastgen.generation.draws import Draws
from fastgen.generation.kernels import BeamTail, beam_obstacle
from fastgen.generation.state import NEVER, BeamState
from fastgen.hf import contract


class Advance:
    """Chooses each row's next beams from the logits; all of it stays on the device."""

    def __init__(
        self,
        call: Call,
        state: BeamState,
        bucket: Bucket,
        process: Callable[[torch.Tensor], torch.Tensor] | None,
        draws: Draws | None = None,
    ) -> None:
        # not the call itself: a captured graph keeps this object, and must not keep the KV cache
        self._state, self.bucket, self._process = state, bucket, process
        self._do_sample, self._records = call.config.do_sample, records(call)
        self.draws = draws
        self._multinomial = torch.multinomial if draws is None else draws.multinomial
        self._early = call.config.early_stopping is True
        self._candidates = candidates(call)
        self._criteria = None if call.plain else call.criteria
        self.length = 0
        self.recorded_scores: tuple[torch.Tensor, ...] | None = None
        """Earlier tokens' scores, if the caller keeps them: criteria see them and this token's."""
        self.logits: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self._probs: torch.Tensor | None = None
        self._tail: BeamTail | cpu.BeamTail | None = None
        options = call.decoder.options
        if call.plain and cpu.served(bucket.tensors["logits"]):
            self._tail = cpu.BeamTail(state, bucket, self._early)
        elif call.plain and beam_obstacle(state, bucket, options, self._candidates) is None:
            self._tail = BeamTail(state, bucket, self._candidates, self._early)

    def __call__(self) -> None:
        log_probs = self._log_probs()
        if self._tail is not None and self._tail.select is not None and not self._do_sample:
            return self._tail(*self._tail.select(log_probs))
        top, indices = self._top(log_probs)
        if self._tail is not None:
            return self._tail(top, indices)
        vocabulary = self.bucket.tensors["logits"].shape[-1]
        self._advance(top, indices // vocabulary, indices % vocabulary)

    def _advance(self, top: torch.Tensor, beams: torch.Tensor, tokens: torch.Tensor) -> None:
        """Make the best of the [B, C] continuations the next beams."""
        state = self._state
        sequences = _gather(state.running, beams)
        sequences.scatter_(2, state.index.expand(*tokens.shape, 1), tokens[:, :, None])
        parents = _gather(state.running_parents, beams)
        numbered = (beams + state.offsets).to(torch.int32)
        parents.scatter_(2, state.new.expand(*tokens.shape, 1), numbered[:, :, None])
        stopped = self._stopped(sequences, tokens)
        state.new.add_(1)
        chosen = self._keep_running(top, sequences, parents, stopped)
        self._update_finished(top, sequences, parents, stopped)
        self._move_on(_gather(beams, chosen))
        self._check_done(stopped)

    def _log_probs(self) -> torch.Tensor:
        """[B * N, V] log-probabilities of every token behind every running beam."""
        state = self._state
        logits = self.bucket.tensors["logits"].to(torch.float32)
        logits = logits.view(state.batch * state.beams, -1)
        log_probs = cpu.log_softmax(logits, out=self._probs)
        if self._process is not None:
            log_probs = self._process(log_probs)
        elif self._criteria is None:  # nobody else holds it
            self._probs = log_probs
        self.logits, self.scores = logits, log_probs
        return log_probs

    def _top(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The [B, C] best (or drawn) continuations: log-probability, and place in a row's N * V."""
        state = self._state
        log_probs = log_probs.reshape(state.batch, state.beams, -1)
        if self._do_sample:
            log_probs = (log_probs + state.running_scores[:, :, None]).view(state.batch, -1)
            probabilities = torch.nn.functional.softmax(log_probs, dim=-1)
            indices = self._multinomial(probabilities, self._candidates)
            top = torch.gather(log_probs, 1, indices)
            if contract.SORTS_DRAWN_BEAMS:
                top, order = top.sort(dim=-1, descending=True)
                indices = indices.gather(-1, order)
        else:
            top, indices = cpu.topk_of_sums(log_probs, state.running_scores, self._candidates)
        return top, indices

    def _stopped(self, sequences: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[B, C]: which continuations end here."""
        state = self._state
        if self._criteria is not None:
            flat = sequences.view(-1, state.capacity)[:, : self.length + 1].contiguous()
            scores: Any = self.recorded_scores
            scores = None if scores is None else (*scores, self.scores)
            return self._criteria(flat, scores).view(tokens.shape)
        stopped = (state.index + 1 >= state.limit).expand(tokens.shape)
        if state.eos.numel():
            stopped = stopped | (tokens[:, :, None] == state.eos).any(dim=-1)
        return stopped

    def _keep_running(
        self, top: torch.Tensor, sequences: torch.Tensor, parents: torch.Tensor, stopped: Any
    ) -> torch.Tensor:
        """The N best continuations that go on become the running beams; gives their candidates."""
        state = self._state
        running = top + stopped.to(torch.float32) * NEVER
        chosen = torch.topk(running, k=state.beams)[1]
        state.running.copy_(_gather(sequences, chosen))
        state.running_scores.copy_(_gather(running, chosen))
        state.running_parents.copy_(_gather(parents, chosen))
        return chosen

    def _update_finished(
        self, top: torch.Tensor, sequences: torch.Tensor, parents: torch.Tensor, stopped: Any
    ) -> None:
        """The N best of the finished and the just finished sequences, unless the search is done."""
        state = self._state
        just_finished = stopped & (torch.arange(top.shape[1], device=top.device) < state.beams)
        top = state.divide(top, state.final_divisor)
        full = state.finished.all(dim=-1, keepdim=True) & self._early
        top += full.to(torch.float32) * NEVER
        top += (~state.improvable).to(torch.float32) * NEVER
        top += (~just_finished) * NEVER
        scores = torch.cat((state.scores, top), dim=1)
        best = torch.topk(scores, k=state.beams)[1]
        for kept, new in (
            (state.sequences, sequences),
            (state.parents, parents),
            (state.finished, just_finished),
            (state.scores, top),
        ):
            merged = _gather(torch.cat((kept, new), dim=1), best)
            kept.copy_(torch.where(state.done, kept, merged))

    def _move_on(self, from_beams: torch.Tensor) -> None:
        """Make the running beams' last tokens the next queries, and show them their ancestors."""
        state, tensors = self._state, self.bucket.tensors
        next_ids = state.running.index_select(2, state.index)[:, :, 0]
        state.ancestors.copy_(_gather(state.ancestors, from_beams))
        # the slot a beam writes next is its own
        own = state.beam_range[None, :, None].expand(state.batch, -1, 1)
        state.ancestors.index_copy_(2, state.index, own)
        state.index.add_(1)
        tensors["input_ids"].copy_(next_ids)
        self.bucket.advance()
        show_ancestors(state, self.bucket)

    def _check_done(self, stopped: torch.Tensor) -> None:
        """Whether any row can still improve, as transformers decides it."""
        state = self._state
        state.steps.add_(~state.done)
        best = state.divide(state.running_scores[:, :1], state.best_divisor)
        worst = torch.where(state.finished, state.scores.amin(dim=1, keepdim=True), NEVER)
        state.improvable &= (best > worst).any(dim=-1, keepdim=True)
        goes_on = state.improvable.any() & ~stopped.all()
        if self._early:
            goes_on = goes_on & ~state.finished.all()
        state.done |= ~goes_on
        state.seen.copy_(state.done, non_blocking=True)


def show_ancestors(state: BeamState, bucket: Bucket) -> None:
    """Fill the bucket's slot mask: slot p * N + n holds the token of beam n at position p. The
    slots of a shared prefix are every beam's, and the others follow it."""
    mask = bucket.tensors["slot_mask"]
    if bucket.prefix:
        places = bucket.tensors["slot_positions"][0].clamp(max=state.capacity - 1)
        ancestors = state.ancestors.index_select(2, places)  # [B, N, L]
        visible = ((bucket.owners < 0) | (ancestors == bucket.owners))[:, None]
    else:
        positions = bucket.size.slots // state.beams
        of_positions = state.ancestors[:, :, :positions, None]  # [B, N, P, 1]
        visible = (of_positions == state.beam_range).view(state.batch, 1, state.beams, -1)
    mask.copy_(torch.where(visible, 0.0, float("-inf")))


def candidates(call: Call) -> int:
    """How many continuations to keep, so that enough remain when all ends are chosen."""
    eos = call.config._eos_token_tensor
    return max(2, 1 + (0 if eos is None else eos.shape[0])) * call.config.num_beams


def _gather(tensor: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """Select along axis 1: [B, N, ...] and [B, C] -> [B, C, ...]."""
    index = beams.view(*beams.shape, *[1] * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])
    return torch.gather(tensor, 1, index)
