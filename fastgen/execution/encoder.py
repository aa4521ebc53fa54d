"""The encoder side of a model: token ids to hidden states, captured where launching dominates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastgen.engines import Engine
from fastgen.engines.fused.encoder import PackedBinding, PackedEngine, pieces, side_streams
from fastgen.engines.fused.packed_values import Call
from fastgen.execution.capturing import (
    CAPTURED_TOKENS,
    Capturing,
    SourceBuffers,
    lasting,
    source_mask,
)
from fastgen.execution.packing import Packing
from fastgen.graphs.shape import LAST_STATE, state_names
from fastgen.options import EngineOptions
from fastgen.target import Target

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

_TOKEN_STEP = 256  # of the sizes of graphs of many tokens
_SEEN_SIZES = 64


class _Size(NamedTuple):
    """What the fused kernels run over."""

    tokens: int
    rows: int
    longest: int
    """Tokens of a row, at most."""
    even: bool = False
    """Whether all rows have as many, and see them all."""


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
        engine: "_lru_cache_wrapper[Engine]",
        target: Target,
        device: torch.device,
        width: int,
        options: EngineOptions,
        layers: int,
        states: Callable[[], Engine],
        more_ids: tuple[str, ...] = (),
        packed: Callable[[], Engine] | None = None,
        fused: PackedEngine | None = None,
    ) -> None:
        """
        Args:
            engine: gives the engine of rows with their padding, made once.
            layers: how many blocks there are.
            states: gives the engine whose outputs are what they read, too.
            more_ids: names of what the graph reads beside token ids, one for each.
            packed: gives the engine of rows without their padding, on the CPU; None computes it.
            fused: serves all calls but those for hidden states of all layers, on a GPU.
        """
        super().__init__(target, device, options)
        self._engine, self._width, self.fused = engine, width, fused
        self._layers, self._states = layers, states
        self._more_ids, self._packed = more_ids, packed
        # what one engine has packed of weights, another would pack again
        self._packs_all = target.narrow
        self.pooling: Engine | None = None
        """What a family's pooler is, if that has a graph."""
        self._replays: dict[tuple[int, ...], Any] = {}
        self._seen: dict[_Size, int] = {}
        """How often calls of a size came; the last one to come is last."""
        self._counted: PackedBinding | None = None
        """What runs calls whose tokens the host knows the number of."""

    @property
    def engine(self) -> Engine:
        """The engine of rows with their padding."""
        return self._engine()

    def run(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, **more: torch.Tensor | int
    ) -> torch.Tensor:
        """Hidden states [B, S, E] of token ids [B, S] int64.

        Args:
            mask: [B, S] of 1 (source token) and 0 (padding), or None.
            more: ``more_ids`` [B, S], or one for all tokens.
        """
        if self._packed is not None:
            if mask is None and self._packs_all and input_ids.numel():
                mask = torch.ones_like(input_ids)
            if mask is not None and (self._packs_all or not mask.all()):
                return self._run_packed(self._without_padding(), input_ids, mask, more)
        batch, sources = input_ids.shape
        hidden, seen = self._empty(batch, sources), source_mask(mask)
        size = batch, self.sources_for(sources)
        if not hidden.numel():
            return hidden
        if self.fused is not None:
            with self.stream():
                self._run_fused(self.fused, self.fused.call(input_ids, mask, hidden, **more))
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

    def _without_padding(self) -> Engine:
        """The engine of rows without their padding: once there is one, it serves all calls, if
        that of rows with their padding has packed weights, too, which are let go."""
        assert self._packed is not None
        if not self._packs_all:  # else a look at the other would build it anew
            copied: tuple[str, ...] = getattr(self.engine, "copied", ())
            if copied:
                self._packs_all = True
                self._engine.cache_clear()
        return self._packed()

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

    def _run_fused(self, fused: PackedEngine, call: Call) -> None:
        """Small calls run over as many tokens as there are places: to know the number of those that
        the mask leaves, the host would wait for the GPU. What is behind them is computed for
        nothing, and where launching takes longest that costs little."""
        batch, sources = call.rows.shape
        padded = self.sources_for(sources)
        small = self.captures_sources(batch, padded)
        if small:
            size = _Size(batch * padded, batch, padded)
            if self._pays_to_capture(size, first=1):
                self._replay_fused(fused, call, size)
                return
        lengths, even = [sources] * batch, call.mask is None
        if call.mask is not None and not call.padding and batch * sources > CAPTURED_TOKENS:
            # the one time that the host waits
            lengths, visible = torch.stack((call.lengths, call.visible)).tolist()
            even = visible == [sources] * batch
        for start, stop, tokens in pieces(lengths):
            size = _Size(tokens, stop - start, max(lengths[start:stop]), even)
            self._run_piece(fused, call.piece(start, stop, tokens), size, small)

    def _run_piece(self, fused: PackedEngine, call: Call, size: _Size, small: bool) -> None:
        if self.captures and not small:
            tokens = -(-size.tokens // _TOKEN_STEP) * _TOKEN_STEP
            padded = _Size(tokens, size.rows, self.sources_for(size.longest))
            padded = size if size.even else padded
            if self._pays_to_capture(padded, first=4):
                self._replay_fused(fused, call, padded)
                return
        found = self._counted
        if found is None or size.tokens > found.tokens or size.rows > found.rows:
            self._counted = None  # its memory serves the new one
            with lasting():
                sizes = (1 << (count - 1).bit_length() for count in (size.tokens, size.rows))
                found = self._counted = fused.bind(*sizes)
        found.run(call, found.size(*size))

    def _pays_to_capture(self, size: _Size, first: int) -> bool:
        """Whether a size is captured, or came as often as ``first`` says, a power of two; as a
        capture takes as long as many calls, one that was dropped must have come twice as often
        to be captured again."""
        count = self._seen[size] = self._seen.pop(size, 0) + 1
        if len(self._seen) > _SEEN_SIZES:
            del self._seen[next(iter(self._seen))]
        return size in self._replays or (count >= first and count & (count - 1) == 0)

    def _replay_fused(self, fused: PackedEngine, call: Call, size: _Size) -> None:
        """Run a call by the captured graph of its size."""

        def make() -> tuple[PackedBinding, Callable[[], None]]:
            binding = fused.bind(size.tokens, size.rows)
            side = side_streams(self.device, size.tokens)
            return binding, self._captured(binding.layers(binding.size(*size), side))

        limit = self.options.max_cached_graphs
        binding, layers = self._once(self._replays, size, make, limit)
        binding.run(call, binding.size(*size), layers)

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
        read = {name: _per_token(input_ids, value) for name, value in values.items()}
        return SourceBuffers(input_ids=input_ids.contiguous(), **read)

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


def _per_token(ids: torch.Tensor, value: torch.Tensor | int) -> torch.Tensor:
    """What a graph reads beside [B, S] ``ids``: ``value`` itself where it lies as they do."""
    if not isinstance(value, torch.Tensor):
        return torch.full(ids.shape, value, dtype=torch.int64, device=ids.device)
    if value.dtype == torch.int64 and value.shape == ids.shape and value.is_contiguous():
        return value
    return torch.empty(ids.shape, dtype=torch.int64, device=ids.device).copy_(value)
