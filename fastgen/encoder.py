"""The encoder side of a model: token ids to hidden states, captured where launching dominates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastgen.capturing import Capturing, SourceBuffers, source_mask
from fastgen.engines import Engine
from fastgen.options import EngineOptions
from fastgen.seq2seq import LAST_STATE, state_names
from fastgen.target import Target


@dataclass(frozen=True)
class _Replay:
    """One size's buffers, and the graph that runs over them."""

    source: SourceBuffers
    hidden: torch.Tensor
    run: Callable[[], None]


class Encoder(Capturing):
    """The encoder engine of one model, and the captured graphs of its sizes."""

    def __init__(
        self,
        engine: Engine,
        target: Target,
        device: torch.device,
        width: int,
        options: EngineOptions,
        layers: int,
        states: Callable[[], Engine],
    ) -> None:
        """
        Args:
            layers: how many blocks there are.
            states: gives the engine whose outputs are what they read, too.
        """
        super().__init__(target, device, options)
        self.engine, self._width = engine, width
        self._layers, self._states = layers, states
        self._replays: dict[tuple[int, int], _Replay] = {}

    def run(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Hidden states [B, S, E] of token ids [B, S] int64.

        Args:
            mask: [B, S] of 1 (source token) and 0 (padding), or None.
        """
        batch, sources = input_ids.shape
        hidden, seen = self._empty(batch, sources), source_mask(mask)
        size = batch, self.sources_for(sources)
        if not hidden.numel():
            return hidden
        if self.captures_sources(*size):
            # one stream for all threads: they share the buffers
            with self.stream():
                limit = self.options.max_cached_graphs
                replay: _Replay = self._once(
                    self._replays, size, lambda: self._replay(*size), limit
                )
                replay.source.fill(sources, input_ids=input_ids, attention_mask=seen)
                replay.run()
                hidden.copy_(replay.hidden[:, :sources])
            return hidden
        given = torch.empty_like(input_ids, memory_format=torch.contiguous_format)
        SourceBuffers(attention_mask=given).fill(sources, attention_mask=seen)
        self._bind(input_ids.contiguous(), given, hidden)()
        return hidden

    def run_with_states(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """What each block reads, in the residual stream's dtype, and last what ``run`` gives: never
        captured, so that who does not ask for it pays nothing."""
        axes, wide = (*input_ids.shape, self._width), getattr(torch, self.target.residual_dtype)
        names = state_names(self._layers)
        states = {n: torch.empty(axes, dtype=wide, device=self.device) for n in names}
        states[LAST_STATE] = self._empty(*input_ids.shape)
        if input_ids.numel():
            given = torch.empty_like(input_ids, memory_format=torch.contiguous_format)
            source = SourceBuffers(attention_mask=given)
            source.fill(input_ids.shape[1], attention_mask=source_mask(mask))
            self._bound_to(self._states(), input_ids.contiguous(), given, states)()
        return list(states.values())

    def _replay(self, batch: int, sources: int) -> _Replay:
        ids = torch.zeros(batch, sources, dtype=torch.int64, device=self.device)
        mask, hidden = torch.ones_like(ids), self._empty(batch, sources)
        source = SourceBuffers(input_ids=ids, attention_mask=mask)
        return _Replay(source, hidden, self._captured(self._bind(ids, mask, hidden)))

    def _bind(
        self, input_ids: torch.Tensor, mask: torch.Tensor, hidden: torch.Tensor
    ) -> Callable[[], None]:
        return self._bound_to(self.engine, input_ids, mask, {LAST_STATE: hidden})

    def _bound_to(
        self,
        engine: Engine,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        outputs: Mapping[str, torch.Tensor],
    ) -> Callable[[], None]:
        positions = torch.arange(input_ids.shape[1], device=self.device)
        tensors = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "query_positions": positions[:, None],
            "key_positions": positions[None, :],
            **outputs,
        }
        return engine.bind(tensors).run

    def _empty(self, batch: int, sources: int) -> torch.Tensor:
        dtype = getattr(torch, self.target.dtype)
        return torch.empty(batch, sources, self._width, dtype=dtype, device=self.device)
