"""The fast loop for greedy decoding and sampling: the device decides, the host runs ahead.

The slow reference is transformers' ``_sample``; every line that touches scores or tokens does
what it does, in the same order, with the installed processors and stopping criteria.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers.generation.utils import (
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)

from fastgen.capturable import NotCapturable
from fastgen.execution.bucket import Bucket
from fastgen.execution.capturing import lasting
from fastgen.execution.decoder import Step
from fastgen.generation import draws as drawing
from fastgen.generation.call import Call, keeps, records
from fastgen.generation.choose import Choose
from fastgen.generation.draws import Draws
from fastgen.generation.rows import Rows
from fastgen.generation.state import SampleState
from fastgen.hf import contract

RUN_AHEAD = 2  # tokens that the host may be ahead of the GPU; as many may be computed in vain


class Loop:
    """What the loops share: the bucket, and how far the host runs ahead of the device."""

    def __init__(self, call: Call, batch: int, beams: int) -> None:
        self.call = call
        self.length = call.prompt
        self.plan = call.plan()
        self.captures = call.decoder.captures and call.plain and self.plan.obstacle is None
        self.captures = self.captures and self.plan.signature not in call.decoder.not_captured
        if self.captures and call.config.do_sample:
            self.captures = drawing.are_torchs(call.decoder.device)
        self.beams = beams
        # generate() repeats each row for its beams
        self.hidden = None if call.hidden is None else call.hidden[::beams]
        self.mask = None if call.mask is None else call.mask[::beams]
        self.rows = Rows(call, self.mask)
        self.bucket = self._enter(call.prompt)
        call.cache.source_mask = self.mask  # what later calls must agree with
        self.state = self._lease_state(batch)  # last: run() gives it back, whatever happens
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []
        self.draws: list[torch.Tensor] = []  # state of the random generator after each token
        self.in_flight: deque[torch.cuda.Event] = deque()
        self._plain: Any = None

    def run(self) -> Any:
        """Decode until every row has stopped, and return what the stock method returns."""
        try:
            self.state.begin(self.call)
            self._prefill()
            while not self._finished() and self.rows.fit(self.length, self._stopped):
                self._record(self._choose())
                self._look()
            output = self._output()
            self.call.decoder.hand_over(*_tensors(output))
            return output
        finally:
            self.state.busy = False

    def _look(self) -> None:
        """Look whether what was launched may count, while a GPU runs it."""
        look, self.call.look = self.call.look, None
        if look is not None:
            look()

    def _make_state(self, batch: int, capacity: int) -> Any:
        raise NotImplementedError

    def _prefill(self) -> None:
        """Run the prompt, and leave its last token to the step that chooses the first new one."""
        raise NotImplementedError

    def _finished(self) -> bool:
        """Whether to stop before the next token; waits only for tokens of a while ago."""
        raise NotImplementedError

    def _stopped(self) -> bool:
        """Whether every row has stopped; waits for all tokens."""
        raise NotImplementedError

    def _output(self) -> Any:
        raise NotImplementedError

    def _lease_state(self, batch: int) -> Any:
        """A state of this size that no other call uses: captured graphs name its addresses."""
        call, decoder = self.call, self.call.decoder
        capacity = decoder.slots_for(call.limit)
        eos = None if call.eos is None else call.eos.numel()
        key = (type(self).__name__, batch, self.beams, capacity, eos)
        with decoder.lock:
            states = decoder.states.pop(key, [])
            decoder.states[key] = states  # now the last to be forgotten
            state = next((s for s in states if not s.busy), None)
            if state is None:
                with lasting():
                    state = self._make_state(batch, capacity)
                states.append(state)
            state.busy = True
            idle = [k for k, kept in decoder.states.items() if not any(s.busy for s in kept)]
            for old in idle[: max(0, len(decoder.states) - decoder.options.max_cached_graphs)]:
                del decoder.states[old]
        return state

    def _enter(self, length: int) -> Bucket:
        call, beams = self.call, self.beams
        if self.hidden is not None:
            return call.decoder.enter(call.cache, self.hidden, self.mask, length, beams)
        rows, prefix = len(call.input_ids) // beams, call.prompt - 1 if beams > 1 else 0
        starts = self.rows.starts
        return call.decoder.enter_rows(call.cache, rows, starts, length, beams, prefix)

    def _grow(self) -> None:
        """Move on to the next bucket; the last tokens wait in the old one."""
        old = self.bucket
        self.call.cache.fill(old.slots_of(self.length - 1))
        self.bucket = self._enter(self.length)
        self.bucket.tensors["input_ids"].copy_(old.tensors["input_ids"])
        self.bucket.seek(self.length - 1)

    def _choose(self) -> Any:
        """Queue a step and the choice that follows it; gives the choice."""
        if self.bucket.slots_of(self.length) > self.bucket.size.slots:
            self._grow()
        phase = self.plan.phase(self.length) if self.captures else None
        chosen = self._eager() if phase is None else self._captured_or_eager(phase)
        self.length += 1
        return chosen

    def _captured_or_eager(self, phase: tuple[bool, ...]) -> Any:
        try:
            return self._captured(phase)
        except NotCapturable:  # a processor of this transformers version waits, or draws
            self.call.decoder.not_captured.add(self.plan.signature)
            self.captures = False
            return self._eager()

    def _eager(self) -> Any:
        raise NotImplementedError

    def _captured(self, phase: tuple[bool, ...]) -> Any:
        raise NotImplementedError

    def _draws(self) -> Draws | None:
        """What all captured steps over one state draw with."""
        if self.call.config.do_sample and self.state.draws is None:
            columns = self.beams * self.bucket.tensors["logits"].shape[-1]
            batch = self.bucket.size.batch
            self.state.draws = Draws(batch, columns, self.call.decoder.device)
        return self.state.draws if self.call.config.do_sample else None

    def _replay(self, step: Step) -> Any:
        """Run a captured step; gives the choice."""
        if step.after.draws is not None:
            step.after.draws.draw()
        step.run()
        return step.after

    def _once_a_bucket(self, make: Callable[[], Any]) -> Any:
        """The choice without processors, which is the same for every token of a bucket."""
        if self._plain is None or self._plain.bucket is not self.bucket:
            self._plain = make()
        return self._plain

    def _record(self, chosen: Any) -> None:
        """Keep what the caller asked to see of a token, and what undoing it takes."""
        call = self.call
        if keeps(call, "output_scores"):
            self.scores.append(chosen.scores.clone())
        if keeps(call, "output_logits"):
            self.logits.append(chosen.logits.clone())
        if call.config.do_sample and not call.waits and call.decoder.device.type == "cuda":
            self.draws.append(torch.cuda.get_rng_state(call.decoder.device))

    def _undo(self, tokens: int) -> None:
        """Take back the last tokens' random draws: the HF loop would not have made them."""
        device = self.call.decoder.device
        # unless another thread drew meanwhile, who must not draw the same again
        if tokens and self.draws and self.draws[-1].equal(torch.cuda.get_rng_state(device)):
            torch.cuda.set_rng_state(self.draws[-1 - tokens], device)

    def _wait(self) -> bool:
        """Wait for a token of a while ago; whether the host may look at what it left."""
        if self.call.decoder.device.type == "cuda":
            self.in_flight.append(torch.cuda.current_stream().record_event())
            if len(self.in_flight) <= RUN_AHEAD:
                return False
            self.in_flight.popleft().synchronize()
        return True


class SampleLoop(Loop):
    """One ``_sample`` call."""

    def __init__(self, call: Call) -> None:
        super().__init__(call, call.input_ids.shape[0], beams=1)

    def _make_state(self, batch: int, capacity: int) -> SampleState:
        return SampleState(batch, capacity, self.call.decoder.device)

    def _prefill(self) -> None:
        """All prompt tokens but the last, whose step also chooses the first new token."""
        call = self.call
        if call.prompt > 1:
            call.decoder.prefill(self.bucket, call.input_ids[:, :-1])
        self.bucket.seek(call.prompt - 1)
        self.bucket.tensors["input_ids"].copy_(call.input_ids[:, -1:])

    def _eager(self) -> Choose:
        """Step, then choose with the installed processors as transformers calls them."""
        call, state, length = self.call, self.state, self.length
        call.decoder.step(self.bucket)()
        if len(call.processors):
            ids = state.sequences[:, :length].contiguous()
            choose = Choose(call, state, self.bucket, lambda scores: call.processors(ids, scores))
        else:
            choose = self._once_a_bucket(lambda: Choose(call, state, self.bucket, None))
        choose()
        return choose

    def _captured(self, phase: tuple[bool, ...]) -> Choose:
        """Step and choice as one graph replay, captured on first use of its bucket and phase."""
        call, state, bucket = self.call, self.state, self.bucket
        settings = (call.config.do_sample, call.has_eos, records(call))

        def make_after() -> Choose:
            process = None
            if self.plan.processors:
                sequences = state.sequences
                process = self.plan.process(sequences[:, : self.length], lambda: sequences)
            return Choose(call, state, bucket.without_steps(), process, self._draws())

        step = call.decoder.step_with(
            bucket,
            key=("sample", state, settings, self.plan.signature, phase),
            make_after=make_after,
            mutable=state.mutable(),
        )
        return self._replay(step)

    def _finished(self) -> bool:
        """Whether to stop before the next token; waits only for tokens of a while ago."""
        call = self.call
        if self.length == call.prompt:
            return False
        if call.waits:
            return self._finished_now()
        if self.length >= call.limit:
            return True
        return call.eos is not None and self._wait() and not self.state.seen_by_host.any()

    def _stopped(self) -> bool:
        # who waits for each token has just asked; without these tokens, length alone stops a row
        return self.call.eos is not None and not bool(self.state.unfinished.any())

    def _finished_now(self) -> bool:
        """Hand the token to the streamer and ask the user's stopping criteria."""
        call, state = self.call, self.state
        if call.streamer is not None:
            call.streamer.put(state.sequences[:, self.length - 1].cpu())
        if not call.plain:
            ids = state.sequences[:, : self.length].contiguous()
            scores = tuple(self.scores) if keeps(call, "output_scores") else None
            state.unfinished &= ~call.criteria(ids, scores)
        return self.length >= call.limit or not bool(state.unfinished.any())

    def _output(self) -> Any:
        call = self.call
        length = self._final_length()
        self._undo(self.length - length)
        call.cache.fill(length - 1)
        sequences = self.state.sequences[:, :length].clone()
        if call.streamer is not None:
            call.streamer.end()
        if not call.config.return_dict_in_generate:
            return sequences
        new = length - call.prompt
        kind: Any = GenerateEncoderDecoderOutput
        if call.hidden is None:
            kind = GenerateDecoderOnlyOutput
        return kind(
            sequences=sequences,
            scores=tuple(self.scores[:new]) if keeps(call, "output_scores") else None,
            logits=tuple(self.logits[:new]) if keeps(call, "output_logits") else None,
            **{contract.CACHE: call.cache},
        )

    def _final_length(self) -> int:
        """Where the HF loop would have stopped: it runs on until the last row has finished."""
        call = self.call
        if call.waits or call.eos is None:
            return self.length
        new = self.state.sequences[:, call.prompt : self.length].cpu().numpy()
        ends = (new[:, :, None] == self.state.eos.cpu().numpy()).any(axis=-1)
        first = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, new.shape[1])
        return call.prompt + int(first.max())


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of what a method returns, but for a KV cache's."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, tuple | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


def sample(call: Call) -> Any:
    """Serve ``_sample``: greedy decoding, or sampling if ``config.do_sample``."""
    return SampleLoop(call).run()
