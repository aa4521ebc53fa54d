"""What decoding loops do on a CPU in place of slower torch operations, with the same results.

All of it runs on the calling thread: a parallel region of torch leaves threads spinning for
milliseconds, on the cores where the engine's next step runs.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from fastgen.kv_cache import Bucket

if TYPE_CHECKING:
    from fastgen.generation.loop import SampleState

_FEW_ROWS = 8  # what one thread computes sooner than others have stopped spinning
_CHUNKS = 256  # of a row, whose maxima tell where its largest values can be


class GreedyTail:
    """What follows a greedy step without processors: ``Choose`` in NumPy, on the same memory.

    A small operation costs NumPy a tenth of the 10 us that it costs torch.
    """

    def __init__(self, state: "SampleState", bucket: Bucket, has_eos: bool, stops: bool) -> None:
        """
        Args:
            has_eos: rows that have finished get the padding token.
            stops: the end-of-sequence tokens finish a row here, not on the host.
        """
        self._has_eos, self._stops = has_eos, stops
        tensors = bucket.tensors
        self._logits, self._input_ids = (
            tensors["logits"][:, -1].numpy(),
            tensors["input_ids"].numpy(),
        )
        self._positions = tensors["query_positions"].numpy()
        self._first_slot, self._queries = tensors["first_slot"].numpy(), bucket.size.queries
        self._sequences, self._index = state.sequences.numpy(), state.index.numpy()
        self._unfinished, self._seen = state.unfinished.numpy(), state.seen.numpy()
        self._pad, self._eos = state.pad.numpy(), state.eos.numpy()

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


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """``torch.argmax(scores, dim=-1)``."""
    if not served(scores):
        return torch.argmax(scores, dim=-1)
    return torch.from_numpy(scores.detach().numpy().argmax(axis=-1))


def topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.topk(scores, k)`` of [B, V]: values and indices, the largest first."""
    if served(scores) and scores.shape[1] >= 16 * _CHUNKS > 16 * k:
        rows = [_largest(row, k) for row in scores.detach().contiguous().numpy()]
        found = [row for row in rows if row is not None]
        if len(found) == len(rows):
            values, indices = (
                torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True)
            )
            return values, indices
    values, indices = torch.topk(scores, k)
    return values, indices


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """``torch.log_softmax(logits, dim=-1)`` of [B, V]."""
    if not served(logits) or len(logits) > _FEW_ROWS:
        return torch.log_softmax(logits, dim=-1)
    result = torch.empty_like(logits)
    for row, out in zip(logits, result, strict=True):  # torch's threads share out whole rows
        torch.log_softmax(row, dim=-1, out=out)
    return result


def served(scores: torch.Tensor) -> bool:
    """Whether NumPy can take the place of torch."""
    return scores.device.type == "cpu" and scores.dtype == torch.float32


def _largest(row: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The k largest of a row and their places; None if equal values (or NaN) leave a choice."""
    end = len(row) // _CHUNKS * _CHUNKS
    maxima = row[:end].reshape(_CHUNKS, -1).max(axis=1)
    if np.isnan(maxima).any() or np.isnan(row[end:]).any():
        return None
    least = np.partition(maxima, -k)[-k]  # k values at least are no smaller
    places = np.flatnonzero(row >= least)
    if len(places) > _CHUNKS:  # many equal values
        return None
    order = np.argsort(-row[places])[: k + 1]
    values = row[places][order]
    if (values[1:] == values[:-1]).any():
        return None
    return values[:k], places[order[:k]]
