"""The decoder side of a model: prefill and step over leased buckets."""

import math
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastgen.engines import Binding, Engine, NotFused
from fastgen.engines.fused.engine import FusedEngine
from fastgen.engines.fused.prompt import KERNEL_ROWS
from fastgen.execution.bucket import Bucket, BucketPool, BucketSize, Leases
from fastgen.execution.capturing import Capturing, SourceBuffers, source_mask
from fastgen.execution.prompt import Prompt
from fastgen.graphs.shape import LAST_STATE, Shape, state_names
from fastgen.options import EngineOptions
from fastgen.target import Target

_PROMPTS = 2  # programs of many tokens that a bucket keeps, with scratch of as many rows
_STEPS = 8  # a bucket's captured steps: one for each choice that followed, and phase of it


def row_starts(mask: torch.Tensor) -> torch.Tensor:
    """Where the rows of a mask [B, P], padded on the left, begin: int64 [B, 1]."""
    return (mask != 0).to(torch.int64).argmax(dim=1, keepdim=True)


@dataclass(frozen=True)
class Step:
    """A step and what follows it, as one function."""

    run: Callable[[], None]
    after: Any


class DecoderEngines(Protocol):
    """Gives a decoder engine; the same one for the same arguments."""

    def __call__(self, slot_mask: bool, slots: int, states: bool = False) -> Engine:
        """
        Args:
            slot_mask: whether it reads a mask over slots.
            slots: for how many slots.
            states: whether its outputs are hidden states, too.
        """


class Decoder(Capturing):
    """The cross and decoder engines of one model, and the buckets they run over."""

    def __init__(
        self,
        shape: Shape,
        target: Target,
        device: torch.device,
        cross: Engine | None,
        decoder: DecoderEngines,
        fused: FusedEngine | None,
        options: EngineOptions,
    ) -> None:
        """
        Args:
            cross: None where there is no source.
            fused: runs steps of few rows in place of ``decoder``, where it can.
        """
        super().__init__(target, device, options)
        self.shape = shape
        self.cross, self.decoder, self.fused = cross, decoder, fused
        self.pool = BucketPool(
            lambda size: Bucket(shape, target, device, size), options.max_cached_graphs
        )
        self.lock = threading.RLock()
        self.states: dict[Hashable, list[Any]] = {}
        """What decoding loops keep on the device between calls, by kind and size."""
        self.calls: dict[Hashable, Any] = {}
        """What ``generate`` made of arguments that were given before, by them."""
        self.not_captured: set[Hashable] = set()
        """Signatures of processors that turned out to wait for the GPU."""
        self._key = object()  # marks this decoder's bindings in buckets that outlive it

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A call's turn: on a GPU one after the other, on the engine's stream, whose lock comes
        before this decoder's own; on a CPU, where each has buffers of its own, calls of several
        threads run side by side."""
        with self.stream():
            yield

    # Buckets

    def slots_for(self, length: int) -> int:
        """The smallest bucket of KV cache slots that holds ``length`` tokens: doubling sizes."""
        slots = self.options.min_bucket
        while slots < length:
            slots *= 2
        return slots

    def enter(
        self,
        cache: Leases,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        length: int,
        beams: int = 1,
    ) -> Bucket:
        """Give the cache a bucket with room for ``length`` tokens and everything the decoder reads.

        Args:
            hidden: encoder hidden states [B, S, E].
            mask: [B, S] of 1 (source token) and 0 (padding), or None.
            beams: sequences that share each row's KV buffer and source.
        """
        batch, sources = hidden.shape[:2]
        slots = beams * self.slots_for(length)
        size = BucketSize(batch, beams, slots, self.sources_for(sources))
        bucket = cache.bucket
        if bucket is None:
            bucket = cache.lease(self.pool, size, fresh=True)
            self.fill_cross(bucket, hidden, mask)
            cache.move_in(sources)
        elif slots > bucket.size.slots:
            bucket = cache.lease(self.pool, size)
        return bucket

    def enter_rows(
        self,
        cache: Leases,
        rows: int,
        starts: torch.Tensor | None,
        length: int,
        beams: int = 1,
        prefix: int = 0,
    ) -> Bucket:
        """``enter`` of a model without an encoder.

        Args:
            rows: sequences, or with beams those that share a KV buffer.
            starts: slots at which rows begin [B, 1]; None: at the first.
            prefix: tokens of a prompt that beams share, if the cache has no bucket yet.
        """
        bucket = cache.bucket
        prefix = prefix if bucket is None else bucket.prefix
        needed = prefix + (length - prefix) * beams if length > prefix else length
        slots = beams * self.slots_for(-(-needed // beams))
        if bucket is None:
            filled = cache.get_seq_length()
            bucket = cache.lease(self.pool, BucketSize(rows, beams, slots, 0), fresh=True)
            bucket.share_prefix(prefix)
            cache.fill(filled)
        elif slots > bucket.size.slots:
            bucket = cache.lease(self.pool, BucketSize(rows, beams, slots, 0))
        bucket.start_rows(starts)
        return bucket

    def fill_cross(self, bucket: Bucket, hidden: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Compute what all tokens share: cross-attention keys and values, mask, tables."""

        def capture() -> tuple[SourceBuffers, Callable[[], None]]:
            source, run = self._cross(bucket)
            return source, self._captured(run)

        kept = self.target.device == "cpu"  # where binding takes as long as launches on a GPU
        if kept or self.captures_sources(bucket.size.batch, bucket.size.sources):
            source, run = self._bound(bucket, "cross", capture)
        else:
            source, run = self._cross(bucket)
        source.fill(hidden.shape[1], encoder_hidden_states=hidden, attention_mask=source_mask(mask))
        run()

    def _cross(self, bucket: Bucket) -> tuple[SourceBuffers, Callable[[], None]]:
        """Buffers of what the cross graph reads, and what runs it over them."""
        axes = bucket.size.batch, bucket.size.sources
        source = SourceBuffers(
            encoder_hidden_states=torch.zeros(
                *axes, self.shape.width, dtype=bucket.dtype, device=self.device
            ),
            attention_mask=torch.ones(axes, dtype=torch.int64, device=self.device),
        )
        shared = bucket.tensors["cross_mask"]
        each = bucket.size.queries > 1  # query tokens read the same mask
        cross_mask = torch.empty_like(shared[:, :, :1]) if each else shared
        assert self.cross is not None
        binding = self.cross.bind(bucket.tensors | source.tensors | {"cross_mask": cross_mask})

        def run() -> None:
            binding.run()
            if each:
                shared.copy_(cross_mask.expand_as(shared))

        return source, run

    # Runs

    def run(
        self, bucket: Bucket, input_ids: torch.Tensor, length: int, last: int | None = None
    ) -> torch.Tensor:
        """Decode query tokens [B, Q] behind ``length`` filled slots -> logits [B, K, V], or without
        a head hidden states [B, Q, E].

        A step (Q as in the bucket) gives the bucket's own tensor, overwritten by the next step.
        More tokens than ``prefill_tokens`` are run in pieces, so that scores take no more memory.

        Args:
            last: of how many last tokens to give logits; None: of all.
        """
        output, tensors = bucket.output(*self.shape.output), bucket.tensors
        if input_ids.shape[1] == bucket.size.queries:
            tensors["input_ids"].copy_(input_ids)
            bucket.seek(length)
            self.step(bucket)()
            return output
        return self._in_pieces(bucket, input_ids, length, last)[self.shape.output[0]]

    def run_with_states(
        self, bucket: Bucket, input_ids: torch.Tensor, length: int, last: int | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """``run``, and what each block reads, in the residual stream's dtype, with the hidden
        states behind the final norm last; never captured, and nothing of it lies in a bucket."""
        found = self._in_pieces(bucket, input_ids, length, last, states=True)
        states = [*state_names(self.shape.layers), LAST_STATE]
        return found[self.shape.output[0]], [found[name] for name in states]

    def prefill(self, bucket: Bucket, input_ids: torch.Tensor) -> None:
        """Decode the first tokens of a prompt [B, Q], of which nobody reads what comes out."""
        self._in_pieces(bucket, input_ids.to(torch.int64), 0, last=0)

    def _in_pieces(
        self,
        bucket: Bucket,
        input_ids: torch.Tensor,
        length: int,
        last: int | None,
        states: bool = False,
    ) -> dict[str, torch.Tensor]:
        """What the graph gives, by name: logits [B, K, V] of the last so many tokens, hidden states
        [B, Q, E]; by one run, or where tokens exceed ``prefill_tokens`` by one after the other."""
        batch, queries = input_ids.shape
        last = queries if last is None else last
        piece = max(1, self.options.prefill_tokens // max(1, batch))
        if queries <= piece:
            return self._prefill(bucket, input_ids, length, last, states)
        wholes = self._outputs(batch, queries, last, states)
        for start in range(0, queries, piece):
            end = min(start + piece, queries)
            count = max(0, end - max(start, queries - last))
            parts = self._prefill(bucket, input_ids[:, start:end], length + start, count, states)
            for name, part in parts.items():
                first = queries - wholes[name].shape[1]  # token that something is given of
                count = max(0, end - max(start, first))
                rows = slice(end - first - count, end - first)
                wholes[name][:, rows] = part[:, part.shape[1] - count :]
        return wholes

    def _outputs(
        self, batch: int, queries: int, last: int, states: bool
    ) -> dict[str, torch.Tensor]:
        """Tensors for what the decoder graph gives besides KV buffers."""
        width, dtype = self.shape.width, self.target.dtype
        found = {self.shape.output[0]: (self.shape.output[1], dtype)}
        if states:
            found[LAST_STATE] = width, dtype
            names = state_names(self.shape.layers)
            found |= dict.fromkeys(names, (width, self.target.residual_dtype))
        return {
            name: torch.empty(
                *(batch, last if name == "logits" else queries, axis),
                dtype=getattr(torch, kind),
                device=self.device,
            )
            for name, (axis, kind) in found.items()
        }

    def _prefill(
        self, bucket: Bucket, input_ids: torch.Tensor, length: int, last: int, states: bool
    ) -> dict[str, torch.Tensor]:
        """One run over tokens [B, Q]: see ``_in_pieces``."""
        batch, queries = input_ids.shape
        positions = torch.arange(length, length + queries, device=self.device)
        if self.target.static_slots:  # TensorRT's plans know no empty axis
            last = max(1, last)
        outputs = self._outputs(batch, queries, last, states)
        bucket.tensors["first_slot"].fill_(length)
        if last == 0 and not states and self._runs_prompt(bucket, input_ids, length):
            return outputs
        tensors = bucket.tensors | {
            "input_ids": input_ids.contiguous(),
            "query_positions": positions[:, None],
            "kept": torch.arange(queries - last, queries, device=self.device),
            **outputs,
        }
        if self.shape.source:
            cross_mask = bucket.tensors["cross_mask"][:, :, :1].expand(-1, -1, queries, -1)
            tensors["cross_mask"] = cross_mask.contiguous()
        if self.target.always_masked:
            shape = batch, 1, queries, bucket.size.slots
            tensors["slot_mask"] = torch.zeros(shape, dtype=bucket.dtype, device=self.device)
        self.decoder(False, bucket.size.slots, states).bind(tensors).run()
        return outputs

    def _runs_prompt(self, bucket: Bucket, input_ids: torch.Tensor, length: int) -> bool:
        """Run tokens [B, Q] of a prompt by fused kernels, if they serve it: as one captured graph
        for each padded size, where launching takes longest."""
        if self.fused is None or self.shape.source:
            return False
        batch, queries = input_ids.shape
        padded = self.sources_for(queries)
        captured = self.captures and batch * padded <= KERNEL_ROWS
        if not captured:
            padded = queries
        made, limit = (bucket.steps, _STEPS) if captured else (bucket.prompts, _PROMPTS)
        key = self._key, ("prompt", padded, None if captured else length)
        fused = self.fused

        def make() -> Prompt:
            prompt = Prompt(fused, bucket, padded, length)
            if captured:
                prompt.run = self._captured(prompt.run)
            return prompt

        try:
            prompt = self._once(made, key, make, limit)
        except NotFused:  # a size, say: the decoder engine serves all
            return False
        prompt.fill(input_ids, length)
        prompt.run()
        return True

    def step(self, bucket: Bucket) -> Callable[[], None]:
        """The function that runs one step over the bucket's tensors: a graph replay on a GPU."""
        step: Callable[[], None] = self._step(
            bucket, "step", lambda: self._captured(self.launch(bucket))
        )
        return step

    def launch(self, bucket: Bucket) -> Callable[[], None]:
        """The function that launches one step's kernels, which may be captured with others."""

        def bind() -> Callable[[], None]:
            return self._bind_step(bucket).run

        launch: Callable[[], None] = self._bound(bucket, "launch", bind)
        return launch

    def _bind_step(self, bucket: Bucket) -> Binding:
        if self.fused is not None:
            with suppress(NotFused):  # too many rows, say: the decoder engine serves every size
                binding = self.fused.bind(bucket.tensors)
                bucket.fused = True
                return binding
        size = bucket.size
        return self.decoder(size.queries > 1, size.slots).bind(bucket.tensors)

    def steps_fused(self) -> bool | None:
        """Whether the fused kernels run the steps of the bucket that was used last; None if there
        are none for this model, or no bucket is idle."""
        idle = self.pool.idle()
        return idle[-1].fused if self.fused is not None and idle else None

    def step_with(
        self,
        bucket: Bucket,
        key: Hashable,
        make_after: Callable[[], Any],
        mutable: list[torch.Tensor],
    ) -> "Step":
        """One step followed by what ``make_after()`` makes, as one captured graph.

        Args:
            key: names what follows; the Step captured first under it serves later calls.
            make_after: called only when there is no Step under ``key``: not once a token.
            mutable: tensors that what follows changes (capturing runs it, and undoes that).
        """

        def capture() -> Step:
            launch, after = self.launch(bucket), make_after()

            def both() -> None:
                launch()
                after()

            return Step(self._captured(both, [*mutable, *bucket.mutable()]), after)

        step: Step = self._step(bucket, key, capture)
        return step

    def _step(self, bucket: Bucket, key: Hashable, make: Callable[[], Any]) -> Any:
        """A step this decoder captured over this bucket, of which few are kept."""
        return self._once(bucket.steps, (self._key, key), make, _STEPS)

    def _bound(self, bucket: Bucket, key: Hashable, make: Callable[[], Any]) -> Any:
        """What this decoder made for this bucket once and for all."""
        return self._once(bucket.bindings, (self._key, key), make, math.inf)
