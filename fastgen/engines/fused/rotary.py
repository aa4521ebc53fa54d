"""Norms of heads and rotary positions: part of the attention that follows, or a launch of their own
(see rotary.cu)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastgen.engines import NotFused
from fastgen.engines.fused.products import Products
from fastgen.engines.fused.values import (
    Angles,
    HeadNormed,
    Part,
    Positions,
    Product,
    TurnArgs,
    Turned,
    TurnRowsArgs,
    pointer,
)
from fastgen.ops.values import Bias

_THREADS = 128
_TURNED_INSIDE = 4  # query tokens of a row whose keys each block of attention turns itself

Factor = Product | Part | Turned  # what attention's queries, keys and values are


@dataclass(frozen=True)
class Turn:
    """How attention's queries and keys are turned."""

    kind: str = "AS_IS"  # what the kernels call it
    args: TurnArgs = field(default_factory=TurnArgs)
    angles: Angles | None = None


class Rotary(Products):
    """Records what turns heads by their positions."""

    def rotary_angles(
        self, positions: Positions, frequencies: Sequence[float], scale: float = 1.0
    ) -> Angles:
        """A table by position, as long as a row may become: made once, before any step."""
        count = self._tensors["slot_positions"].shape[1]
        places = torch.arange(count, dtype=torch.float32, device=self.device)
        angles = places[:, None] * torch.tensor(list(frequencies), device=self.device)
        table = scale * torch.stack((angles.cos(), angles.sin()), dim=-1)
        self._scratch["angles", len(self._scratch)] = table
        return Angles(positions, table)

    def rotary(self, x: Product | HeadNormed, angles: Angles, heads: int) -> Turned:
        head_size = 2 * angles.table.shape[1]
        if head_size % 16:
            raise NotFused(f"head size {head_size}: halves must be multiples of 8 to be turned")
        return Turned(x, angles)

    def head_norm(self, x: Product, weight: Any, eps: float) -> HeadNormed:
        return HeadNormed(x, self._narrow(weight), eps)

    def _unturned(self, q: Factor, k: Factor) -> tuple[Any, Any, Turn]:
        """The products of queries and keys, and how what they give is turned."""
        if not isinstance(q, Turned) or not isinstance(k, Turned):
            if any(isinstance(x, Turned | HeadNormed) for x in (q, k)):
                raise NotFused("queries or keys that alone are turned, or only normed")
            return q, k, Turn()
        table = q.angles.table
        args = TurnArgs(angles=table.data_ptr(), known=len(table))
        if q.angles is not k.angles:
            raise NotFused("queries and keys that are turned by other angles")
        if not isinstance(q.x, HeadNormed) or not isinstance(k.x, HeadNormed):
            if isinstance(q.x, HeadNormed) or isinstance(k.x, HeadNormed):
                raise NotFused("norms of queries or of keys alone")
            return q.x, k.x, Turn("TURNED", args, q.angles)
        if q.x.eps != k.x.eps:
            raise NotFused("norms of queries and keys that differ in eps")
        args.query_norm, args.key_norm = q.x.weight.data_ptr(), k.x.weight.data_ptr()
        args.eps = q.x.eps
        return q.x.product, k.x.product, Turn("NORMED", args, q.angles)

    def _turns_inside(self) -> bool:
        """Whether attention turns heads itself."""
        return isinstance(self.query_count, int) and self.query_count <= _TURNED_INSIDE

    def _turn_rows(self, rows: torch.Tensor, heads: int, keys: int, turn: Turn, bias: Bias) -> None:
        """Launch the turn of queries and keys [rows, stride], in place."""
        assert turn.angles is not None
        head_size = 2 * turn.angles.table.shape[1]
        lanes = lanes_of(head_size)
        blocks = -(-(heads + keys) * lanes // _THREADS)
        arguments = TurnRowsArgs(
            x=rows.data_ptr(),
            query_positions=bias.query_positions.data_ptr(),
            row_start=pointer(bias.row_start),
            heads=heads,
            keys=keys,
            stride=rows.shape[1],
            queries=self._queries,
            turn=turn.args,
        )
        body = f"turn_rows<{head_size}, {blocks}, {turn.kind}>"
        self._launch(body, (self._rows * blocks, 1), _THREADS, arguments)


def lanes_of(head_size: int) -> int:
    """Threads that hold a head: eight elements each, and a power of two."""
    return 1 << (-(-head_size // 8) - 1).bit_length()
