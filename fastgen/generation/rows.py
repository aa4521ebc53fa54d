"""Where the rows of a prompt begin, and how long they may become."""

import math
from collections.abc import Callable

import torch

from fastgen.execution.decoder import row_starts
from fastgen.generation.call import Call


class Rows:
    """The rows of one call, padded on the left; with an encoder all begin at the first slot."""

    def __init__(self, call: Call, mask: torch.Tensor | None) -> None:
        """
        Args:
            mask: [B, P] of 1 (token) and 0 (padding), or None; with an encoder that of its tokens.
        """
        self.starts: torch.Tensor | None = None
        """Slots at which rows begin, int64 [B, 1]; None: at the first."""
        self.places: float = math.inf
        """Tokens, padding included, of which the model can tell the last one's position."""
        first, positions = 0, call.decoder.shape.positions
        if mask is not None and not call.decoder.shape.source:
            self.starts = row_starts(mask)
            if positions is not None and call.limit - 1 > positions:  # else no need to wait for it
                first = int(self.starts.min())
        if positions is not None:
            self.places = first + positions
        self._positions = positions

    def fit(self, length: int, stopped: Callable[[], bool]) -> bool:
        """Whether a step may run over ``length`` tokens.

        Args:
            stopped: waits, and says whether every row has stopped; then none needs the step.

        Raises:
            IndexError: a row goes on behind the model's last position.
        """
        if length <= self.places:
            return True
        if stopped():
            return False
        raise IndexError(
            f"index out of range in self: position {self._positions} of a row, where the model "
            f"knows {self._positions} positions. Ask for fewer tokens, or give a shorter prompt."
        )
