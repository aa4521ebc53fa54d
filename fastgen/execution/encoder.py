"""The encoder side of a model: token ids to hidden states, captured where launching dominates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastgen.engines import Engine
from fastgen.execution.capturing import Capturing, SourceBuffers, source_mask
from fastgen.execution.packing import Packing
from fastgen.graphs.shape import LAST_STATE, state_names
from fastgen.options import EngineOptions
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
        more_ids: tuple[str, ...] = (),
        packed: Callable[[], Engine] | None = None,
    ) -> None:
        """
        Args:
            layers: how many blocks there are.
            states: gives the engine whose outputs are what they read, too.
            more_ids: names of what the graph reads beside token ids, one for each.
            packed: gives the engine of rows without their padding, on the CPU; None computes it.
        """
        super().__init__(target, device, options)
        self.engine, self._width = engine, width
        self._layers, self._states = layers, states
        self._more_ids, self._packed = more_ids, packed
        self._replays: dict[tuple[int, int], _Replay] = {}

    def run(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, **more: torch.Tensor | int
    ) -> torch.Tensor:
        """Hidden states [B, S, E] of token ids [B, S] int64.

        Args:
            mask: [B, S] of 1 (source token) and 0 (padding), or None.
            more: ``more_ids`` [B, S], or one for all tokens.
        """
        if self._packed is not None and mask is not None and not mask.all():
            return self._run_packed(self._packed(), input_ids, mask, more)
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
                replay.source.fill(sources, input_ids=input_ids, attention_mask=seen, **more)
                replay.run()
                hidden.copy_(replay.hidden[:, :sources])
            return hidden
        source = self._filled(input_ids, attention_mask=seen, **more)
        self._bound_to(self.engine, source, {LAST_STATE: hidden})()
        return hidden

    def run_with_states(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, **more: torch.Tensor | int
    ) -> list[torch.Tensor]:
        """What each block reads, in the residual stream's dtype, and last what ``run`` gives: never
        captured, so that who does not ask for it pays nothing."""
        axes, wide = (*input_ids.shape, self._width), getattr(torch, self.target.residual_dtype)
        names = state_names(self._layers)
        states = {n: torch.empty(axes, dtype=wide, device=self.device) for n in names}
        states[LAST_STATE] = self._empty(*input_ids.shape)
        if input_ids.numel():
            source = self._filled(input_ids, attention_mask=source_mask(mask), **more)
            self._bound_to(self._states(), source, states)()
        return list(states.values())

    def _run_packed(
        self,
        engine: Engine,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        more: Mapping[str, torch.Tensor | int],
    ) -> torch.Tensor:
        packing = Packing.of(mask)
        ids = packing.pack(input_ids)
        values = {n: packing.pack(v) if isinstance(v, torch.Tensor) else v for n, v in more.items()}
        hidden = self._empty(*ids.shape)
        tensors = {
            **self._filled(ids, **values).tensors,
            "attention_mask": (mask != 0).to(torch.int64),
            "query_positions": torch.arange(mask.shape[1])[:, None],
            "key_positions": packing.tokens[None] % mask.shape[1],
            "places": packing.places,
            "tokens": packing.tokens,
            LAST_STATE: hidden,
        }
        engine.bind(tensors).run()
        return packing.spread(hidden)

    def _filled(self, input_ids: torch.Tensor, **values: torch.Tensor | int) -> SourceBuffers:
        """What the graph reads for each token, in tensors of its own where it must be."""
        made = {
            n: torch.empty(input_ids.shape, dtype=torch.int64, device=self.device) for n in values
        }
        SourceBuffers(**made).fill(input_ids.shape[1], **values)
        return SourceBuffers(input_ids=input_ids.contiguous(), **made)

    def _replay(self, batch: int, sources: int) -> _Replay:
        ids = torch.zeros(batch, sources, dtype=torch.int64, device=self.device)
        more = {name: torch.zeros_like(ids) for name in self._more_ids}
        source = SourceBuffers(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
        hidden = self._empty(batch, sources)
        run = self._bound_to(self.engine, source, {LAST_STATE: hidden})
        return _Replay(source, hidden, self._captured(run))

    def _bound_to(
        self, engine: Engine, source: SourceBuffers, outputs: Mapping[str, torch.Tensor]
    ) -> Callable[[], None]:
        positions = torch.arange(source.tensors["input_ids"].shape[1], device=self.device)
        tensors = {
            **source.tensors,
            "query_positions": positions[:, None],
            "key_positions": positions[None, :],
            **outputs,
        }
        return engine.bind(tensors).run

    def _empty(self, batch: int, sources: int) -> torch.Tensor:
        dtype = getattr(torch, self.target.dtype)
        return torch.empty(batch, sources, self._width, dtype=dtype, device=self.device)
