"""Rows without their padding: where each token lies in a ragged batch, and back."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Packing:
    """The T tokens of a ragged batch [B, S], row by row.

    The first place of each row counts as a token even where it is hidden: pooled outputs read it.
    """

    tokens: torch.Tensor
    """int64 [T]: the place of each token, row * S + column."""
    places: torch.Tensor
    """int64 [B, S]: the token of each place; some other one where there is padding."""

    @classmethod
    def of(cls, mask: torch.Tensor) -> "Packing":
        """The packing of a mask [B, S] whose zeros are padding, on any side or in between."""
        kept = mask != 0
        kept[:, 0] = True
        flat = kept.flatten()
        return cls(flat.nonzero().flatten(), (flat.cumsum(0) - 1).view_as(kept))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [1, T]."""
        return values.reshape(-1)[self.tokens][None]

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, T, E] -> [B, S, E], zeros at padding."""
        # NumPy: torch's threads would spin on where the engine's are to run next
        spread = np.zeros((self.places.numel(), packed.shape[-1]), np.float32)
        spread[self.tokens.numpy()] = packed[0].numpy()
        return torch.from_numpy(spread).view(*self.places.shape, -1)
