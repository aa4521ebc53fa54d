"""What follows a step of greedy decoding or sampling: the choice of each row's next token."""

from collections.abc import Callable

import torch

from fastgen.execution.bucket import Bucket
from fastgen.generation import cpu
from fastgen.generation.call import Call, records
from fastgen.generation.draws import Draws
from fastgen.generation.kernels import GreedyTail, greedy_obstacle
from fastgen.generation.state import SampleState


class Choose:
    """Chooses each row's next token from the logits; all of it stays on the device."""

    def __init__(
        self,
        call: Call,
        state: SampleState,
        bucket: Bucket,
        process: Callable[[torch.Tensor], torch.Tensor] | None,
        draws: Draws | None = None,
    ) -> None:
        # not the call itself: a captured graph keeps this object, and must not keep the KV cache
        self._state, self.bucket, self._process = state, bucket, process
        self._do_sample, self.draws = call.config.do_sample, draws
        self._multinomial = torch.multinomial if draws is None else draws.multinomial
        self._has_eos, self._eos = call.has_eos, call.plain and call.eos is not None
        self._records = records(call)
        self.logits: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self._tail: Callable[[], None] | None = None
        if process is None and not self._do_sample and not self._records:
            if cpu.served(bucket.tensors["logits"]):
                self._tail = cpu.greedy_tail(state, bucket, self._has_eos, self._eos)
            elif greedy_obstacle(state, bucket, call.decoder.options) is None:
                self._tail = GreedyTail(state, bucket, self._has_eos, self._eos)

    def __call__(self) -> None:
        if self._tail is not None:
            return self._tail()
        state, tensors = self._state, self.bucket.tensors
        scores = tensors["logits"][:, -1]
        if self._process is not None or self._do_sample or self._records:
            self.logits = scores = scores.to(torch.float32, copy=True)
        if self._process is not None:
            scores = self._process(scores)
        self.scores = scores
        if self._do_sample:
            probabilities = torch.nn.functional.softmax(scores, dim=-1)
            tokens = self._multinomial(probabilities, 1).squeeze(1)
        else:
            tokens = cpu.argmax(scores)
        if self._has_eos:
            tokens = torch.where(state.unfinished, tokens, state.pad)
        state.sequences.index_copy_(1, state.index, tokens[:, None])
        tensors["input_ids"].copy_(tokens[:, None])
        if self._eos:
            state.unfinished &= (tokens[:, None] != state.eos).all(dim=-1)
            state.seen.copy_(state.unfinished, non_blocking=True)
        state.index.add_(1)
        self.bucket.advance()
