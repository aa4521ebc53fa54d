"""What decoding loops do on a CPU in place of slower torch operations, with the same results.

All of it runs on the calling thread: a parallel region of torch leaves threads spinning for
milliseconds, on the cores where the engine's next step runs.
"""

from typing import Any

import numpy as np
import torch

from fastgen.execution.bucket import Bucket
from fastgen.generation.state import NEVER, BeamState, SampleState

_NEVER = np.float32(NEVER)
_FEW_ROWS = 8  # what one thread computes sooner than others have stopped spinning
_EACH = 32  # places of a vocabulary in each class, whose maximum tells where the largest can be


class GreedyTail:
    """What follows a greedy step without processors: ``Choose`` in NumPy, on the same memory.

    A small operation costs NumPy a tenth of the 10 us that it costs torch.
    """

    def __init__(self, state: SampleState, bucket: Bucket, has_eos: bool, stops: bool) -> None:
        """
        Args:
            has_eos: rows that have finished get the padding token.
            stops: the end-of-sequence tokens finish a row here, not on the host.
        """
        self._has_eos, self._stops = has_eos, stops
        tensors = bucket.tensors
        self._of = tensors["logits"], state.eos, has_eos, stops
        self._logits, self._input_ids = (
            tensors["logits"][:, -1].numpy(),
            tensors["input_ids"].numpy(),
        )
        self._positions = tensors["query_positions"].numpy()
        self._first_slot, self._queries = tensors["first_slot"].numpy(), bucket.size.queries
        self._sequences, self._index = state.sequences.numpy(), state.index.numpy()
        self._unfinished, self._seen = state.unfinished.numpy(), state.seen.numpy()
        self._pad, self._eos = state.pad.numpy(), state.eos.numpy()

    def is_of(self, *given: Any) -> bool:
        """Whether it was made for these logits and end tokens, and with these arguments."""
        return all(one is other for one, other in zip(self._of, given, strict=True))

    def __call__(self) -> None:
        tokens = self._logits.argmax(axis=-1)
        if self._has_eos:
            tokens = np.where(self._unfinished, tokens, self._pad)
        self._sequences[:, self._index[0]] = tokens
        self._input_ids[:, 0] = tokens
        if self._stops:
            self._unfinished &= (tokens[:, None] != self._eos).all(axis=-1)
            self._seen[:] = self._unfinished
        self._index += 1
        self._positions += 1  # as Bucket.advance
        self._first_slot += self._queries


def greedy_tail(state: SampleState, bucket: Bucket, has_eos: bool, stops: bool) -> GreedyTail:
    """A ``GreedyTail``: that of the state's last call, if it is the same."""
    tail: GreedyTail | None = state.tail
    if tail is None or not tail.is_of(bucket.tensors["logits"], state.eos, has_eos, stops):
        tail = state.tail = GreedyTail(state, bucket, has_eos, stops)
    return tail


class BeamTail:
    """What follows the choice of candidates: ``Advance._advance`` in NumPy, on the same memory.

    Equal scores are torch's to order. Axes as in ``advance``.
    """

    select = None

    def __init__(self, state: BeamState, bucket: Bucket, early: bool) -> None:
        self._state = {
            name: value.numpy()
            for name, value in vars(state).items()
            if isinstance(value, torch.Tensor)
        }
        self._tensors = {
            name: bucket.tensors[name].numpy()
            for name in ("input_ids", "query_positions", "first_slot", "slot_mask")
        }
        self._owners = None
        if bucket.prefix:
            self._owners = bucket.owners.numpy()
            self._places = bucket.tensors["slot_positions"][0].numpy()
        self._vocabulary = bucket.tensors["logits"].shape[-1]
        self._rows = np.arange(state.batch)[:, None]
        self._early = early

    @np.errstate(all="ignore")  # as torch: a length penalty may make 0 or inf
    def __call__(self, top: torch.Tensor, indices: torch.Tensor) -> None:
        """Make the best of the [B, C] continuations the next beams."""
        state, rows = self._state, self._rows
        beams, tokens = np.divmod(indices.numpy(), self._vocabulary)
        at = int(state["index"][0])
        sequences = state["running"][rows, beams]
        sequences[:, :, at] = tokens
        parents = state["running_parents"][rows, beams]
        parents[:, :, int(state["new"][0])] = beams + state["offsets"]
        stopped = (tokens[:, :, None] == state["eos"]).any(axis=-1) | (at + 1 >= state["limit"][0])
        state["new"] += 1
        running = top.numpy() + stopped * _NEVER
        chosen = _best(running, state["running"].shape[1])
        state["running"][:] = sequences[rows, chosen]
        state["running_scores"][:] = running[rows, chosen]
        state["running_parents"][:] = parents[rows, chosen]
        if not state["done"][0]:
            self._update_finished(top.numpy(), sequences, parents, stopped)
        self._move_on(beams[rows, chosen], at)
        self._check_done(stopped)

    def _update_finished(
        self, top: np.ndarray, sequences: np.ndarray, parents: np.ndarray, stopped: np.ndarray
    ) -> None:
        state = self._state
        beams = state["scores"].shape[1]
        just_finished = stopped & (np.arange(top.shape[1]) < beams)
        scores = top / state["final_divisor"][state["new"]]
        scores += (state["finished"].all(axis=-1, keepdims=True) & self._early) * _NEVER
        scores += ~state["improvable"] * _NEVER
        scores += ~just_finished * _NEVER
        best = _best(np.concatenate((state["scores"], scores), axis=1), beams)
        new = {"sequences": sequences, "parents": parents, "finished": just_finished}
        for name, value in (new | {"scores": scores}).items():
            merged = np.concatenate((state[name], value), axis=1)
            state[name][:] = merged[self._rows, best]

    def _move_on(self, from_beams: np.ndarray, at: int) -> None:
        state, tensors = self._state, self._tensors
        ancestors = state["ancestors"][self._rows, from_beams]
        ancestors[:, :, at] = state["beam_range"]
        state["ancestors"][:] = ancestors
        state["index"] += 1
        queries = tensors["input_ids"].shape[1]
        tensors["input_ids"][:] = state["running"][:, :, at]
        tensors["query_positions"] += 1  # as Bucket.advance
        tensors["first_slot"] += queries
        mask = tensors["slot_mask"]
        if self._owners is None:
            visible = ancestors[:, :, : mask.shape[-1] // queries, None] == state["beam_range"]
        else:  # as advance.show_ancestors
            places = np.minimum(self._places, ancestors.shape[-1] - 1)
            visible = (self._owners < 0) | (ancestors[:, :, places] == self._owners)
        mask[:] = np.where(visible.reshape(mask.shape), np.float32(0), np.float32(-np.inf))

    def _check_done(self, stopped: np.ndarray) -> None:
        state = self._state
        state["steps"] += ~state["done"]
        best = state["running_scores"][:, :1] / state["best_divisor"][state["new"]]
        worst = np.where(state["finished"], state["scores"].min(axis=1, keepdims=True), _NEVER)
        state["improvable"] &= (best > worst).any(axis=-1, keepdims=True)
        goes_on = state["improvable"].any() and not stopped.all()
        if self._early and state["finished"].all():
            goes_on = False
        state["done"] |= not goes_on
        state["seen"][:] = state["done"]


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    best: np.ndarray = torch.topk(torch.from_numpy(scores), k)[1].numpy()
    return best


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """``torch.argmax(scores, dim=-1)``."""
    if not served(scores):
        return torch.argmax(scores, dim=-1)
    return torch.from_numpy(scores.detach().numpy().argmax(axis=-1))


def topk_of_sums(
    values: torch.Tensor, added: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.topk`` of [B, N, V] ``values + added[:, :, None]`` over both N and V."""
    if served(values) and values.shape[2] >= 8 * _EACH * k:
        sums, places = (
            torch.empty(len(values), k, dtype=dtype) for dtype in (torch.float32, torch.int64)
        )
        rows = (tensor.numpy() for tensor in (values, added, sums, places))
        if all(_largest_sums(*row) for row in zip(*rows, strict=True)):
            return sums, places
    sums, places = torch.topk((values + added[:, :, None]).flatten(1), k)
    return sums, places


def log_softmax(logits: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """``torch.log_softmax(logits, dim=-1)`` of [B, V]; on a CPU few rows go to ``out``."""
    if not served(logits) or len(logits) > _FEW_ROWS:
        return torch.log_softmax(logits, dim=-1)
    result = torch.empty_like(logits) if out is None else out
    for row, to in zip(logits, result, strict=True):  # torch's threads share out whole rows
        torch.log_softmax(row, dim=-1, out=to)
    return result


def served(scores: torch.Tensor) -> bool:
    """Whether NumPy can take the place of torch."""
    return scores.device.type == "cpu" and scores.dtype == torch.float32


def _largest_sums(
    values: np.ndarray, added: np.ndarray, sums: np.ndarray, places: np.ndarray
) -> bool:
    """The k largest of [N, V] ``values + added[:, None]``, written to [k] ``sums`` and ``places``;
    False if equal sums (or NaN) leave a choice. Rounding keeps the order, so the largest value of
    a class has its largest sum."""
    k, vocabulary = len(sums), values.shape[1]
    width = vocabulary // _EACH
    end = width * _EACH
    classes = values[:, :end].reshape(-1, _EACH, width)  # places of one class are width apart
    largest = classes.max(axis=1)
    largest += added[:, None]
    least = np.partition(largest, -k, axis=None)[-k]  # k sums at least are no smaller
    beam, chosen = np.nonzero(~(largest < least))  # NaN too
    if len(beam) > 4 * k:  # many equal sums
        return False
    found = np.append(
        classes[beam, :, chosen] + added[beam, None], values[:, end:] + added[:, None]
    )
    at = np.append(
        (beam * vocabulary + chosen)[:, None] + np.arange(_EACH) * width,
        np.arange(len(values))[:, None] * vocabulary + np.arange(end, vocabulary),
    )
    order = np.argsort(-found)[: k + 1]
    best = found[order]
    if np.isnan(found).any() or not (best[1:] < best[:-1]).all():
        return False
    sums[:], places[:] = best[:k], at[order[:k]]
    return True
