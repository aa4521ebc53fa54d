"""What decoding loops do on a CPU in place of slower torch operations, with the same results.

All of it runs on the calling thread: a parallel region of torch leaves threads spinning for
milliseconds, on the cores where the engine's next step runs.
"""

import numpy as np
import torch

_FEW_ROWS = 8  # what one thread computes sooner than others have stopped spinning
_CHUNKS = 256  # of a row, whose maxima tell where its largest values can be


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """``torch.argmax(scores, dim=-1)``."""
    if not _served(scores):
        return torch.argmax(scores, dim=-1)
    return torch.from_numpy(scores.detach().numpy().argmax(axis=-1))


def topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.topk(scores, k)`` of [B, V]: values and indices, the largest first."""
    if _served(scores) and scores.shape[1] >= 16 * _CHUNKS > 16 * k:
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
    if not _served(logits) or len(logits) > _FEW_ROWS:
        return torch.log_softmax(logits, dim=-1)
    result = torch.empty_like(logits)
    for row, out in zip(logits, result, strict=True):  # torch's threads share out whole rows
        torch.log_softmax(row, dim=-1, out=out)
    return result


def _served(scores: torch.Tensor) -> bool:
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
