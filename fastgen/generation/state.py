"""What the decoding loops keep on the device: tokens, scores, beams, and what ends them."""

from typing import Any

import torch

from fastgen.execution.capturing import host_flags, lasting
from fastgen.generation.call import Call
from fastgen.generation.draws import Draws

NEVER = -1.0e9  # transformers' score of what must not be chosen


class SampleState:
    """The tokens of one batch on the device, and what choosing the next one changes."""

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.sequences = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)  # where the next token goes
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        self.pad = torch.zeros((), dtype=torch.int64, device=device)
        self.eos = torch.zeros(0, dtype=torch.int64, device=device)
        self.draws: Draws | None = None
        self.tail: Any = None
        """What followed the last call's steps on a CPU."""
        self.seen = host_flags(self, batch, device)
        """``unfinished`` as the host sees it, at most ``RUN_AHEAD`` tokens late."""
        self.seen_by_host = self.seen.numpy()
        self.busy = False

    def begin(self, call: Call) -> None:
        """Start a new batch; unfilled places repeat the row's first token."""
        self.sequences.copy_(call.input_ids[:, :1].expand_as(self.sequences))
        self.sequences[:, : call.prompt] = call.input_ids
        self.index.fill_(call.prompt)
        self.unfinished.fill_(True)
        self.seen.fill_(True)
        if call.has_eos:
            self.pad.copy_(call.config._pad_token_tensor)
        self.eos = kept_eos(self.eos, call)

    def mutable(self) -> list[torch.Tensor]:
        return [self.sequences, self.index, self.unfinished]


class BeamState:
    """Running and finished beams of one batch, on the device."""

    def __init__(self, batch: int, beams: int, capacity: int, device: torch.device) -> None:
        self.batch, self.beams, self.capacity = batch, beams, capacity

        def full(*axes: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(batch, *axes, dtype=dtype, device=device)

        self.running = full(beams, capacity)  # tokens
        self.sequences = full(beams, capacity)
        self.running_scores = full(beams, dtype=torch.float32)
        self.scores = full(beams, dtype=torch.float32)
        self.finished = full(beams, dtype=torch.bool)
        self.improvable = full(1, dtype=torch.bool)
        self.running_parents = full(beams, capacity, dtype=torch.int32)  # HF's beam_indices
        self.parents = full(beams, capacity, dtype=torch.int32)
        self.ancestors = full(beams, capacity)  # beam whose slot holds a beam's token, by position
        self.index = torch.zeros(1, dtype=torch.int64, device=device)  # where the next token goes
        self.new = torch.zeros(1, dtype=torch.int64, device=device)  # how many tokens are new
        self.done = torch.zeros(1, dtype=torch.bool, device=device)
        self.steps = torch.zeros(1, dtype=torch.int64, device=device)  # tokens until ``done``
        self.limit = torch.zeros(1, dtype=torch.int64, device=device)
        self.draws: Draws | None = None
        self.seen = host_flags(self, 1, device)
        """``done`` as the host sees it, at most ``RUN_AHEAD`` tokens late."""
        self.final_divisor = torch.zeros(capacity + 2, dtype=torch.float32, device=device)
        self.best_divisor = torch.zeros(capacity + 2, dtype=torch.float32, device=device)
        self.eos = torch.zeros(0, dtype=torch.int64, device=device)
        self.offsets = (torch.arange(batch, device=device) * beams)[:, None]
        self.beam_range = torch.arange(beams, device=device)
        self.busy = False

    def begin(self, call: Call) -> None:
        """Start a new batch as ``_beam_search`` does."""
        config, prompt = call.config, call.prompt
        self.running.fill_(_fill_value(config))
        self.running[:, :, :prompt] = call.input_ids.view(self.batch, self.beams, prompt)
        self.sequences.copy_(self.running)
        self.running_scores.fill_(NEVER)
        self.running_scores[:, 0] = 0.0
        self.scores.fill_(NEVER)
        self.finished.fill_(False)
        self.improvable.fill_(True)
        self.running_parents.fill_(-1)
        self.parents.fill_(-1)
        self.ancestors.copy_(self.beam_range[None, :, None].expand_as(self.ancestors))
        self.index.fill_(prompt)
        self.new.fill_(0)
        self.done.fill_(False)
        self.seen.fill_(False)
        self.steps.fill_(0)
        self.limit.fill_(call.limit)
        self.eos = kept_eos(self.eos, call)
        self._set_divisors(call)

    def _set_divisors(self, call: Call) -> None:
        """Length penalties by number of new tokens. torch divides a CUDA tensor by a number by
        multiplying with its float32 reciprocal, so on a GPU the reciprocals stand here."""
        penalty, longest = call.config.length_penalty, call.config.max_length - call.prompt
        counts = range(min(len(self.final_divisor), call.limit - call.prompt + 2))
        lengths = [float(max(n, 1)) ** penalty for n in counts]  # more of them may overflow
        final = torch.ones(len(self.final_divisor))
        final[: len(lengths)] = torch.tensor(lengths, dtype=torch.float32)
        best = final.clone()
        if call.config.early_stopping == "never" and penalty > 0.0:
            best.fill_(float(longest) ** penalty)
        if self.running.is_cuda:
            final, best = 1.0 / final, 1.0 / best
        self.final_divisor.copy_(final)
        self.best_divisor.copy_(best)

    def mutable(self) -> list[torch.Tensor]:
        names = "running sequences running_scores scores finished improvable running_parents"
        names += " parents ancestors index new done steps"
        return [getattr(self, name) for name in names.split()]

    def divide(self, scores: torch.Tensor, divisors: torch.Tensor) -> torch.Tensor:
        """Apply the length penalty for ``new`` tokens."""
        divisor = divisors.index_select(0, self.new)
        return scores * divisor if scores.is_cuda else scores / divisor


def kept_eos(kept: torch.Tensor, call: Call) -> torch.Tensor:
    """The call's end-of-sequence tokens, where captured graphs read those of all calls."""
    if call.eos is not None:
        if kept.shape != call.eos.shape:
            with lasting():
                kept = torch.empty_like(call.eos)
        kept.copy_(call.eos)
    return kept


def _fill_value(config: Any) -> int:
    """What transformers fills unwritten places with (a pad id of 0 gives the end token)."""
    if config._eos_token_tensor is None:
        return -1
    eos = config.eos_token_id if isinstance(config.eos_token_id, int) else config.eos_token_id[0]
    return int(config.pad_token_id or eos)
