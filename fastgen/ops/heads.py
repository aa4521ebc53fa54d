"""The part of the vocabulary that speaks of single heads: rotary positions, norms of heads, and
query heads that share keys and values; lowered to standard ONNX (letters as in ``standard.py``)."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from fastgen.ops.typed import Typed
from fastgen.ops.values import Angles, Bias, Groups, Value


class Heads(Typed):
    """Base of ``Ops``, which gives what is only declared here."""

    rms_norm: Any
    spelled_out: Any
    _tiled: dict[tuple[Bias, int], Value]

    def rotary_angles(
        self, positions: Value, frequencies: Sequence[float], scale: float = 1.0
    ) -> Angles:
        """Positions [B or 1, Q] -> the angles of D / 2 frequencies, in float32; their cosines and
        sines are multiplied by ``scale``."""
        last = self.constant([2], torch.int64)
        wide = self.onnx.Cast(self.onnx.Unsqueeze(positions, last), to=ir.DataType.FLOAT)
        angles = self.onnx.Mul(wide, self.constant(list(frequencies), torch.float32))
        cosines, sines = (
            self._scaled(self._typed(x, ir.DataType.FLOAT), scale)
            for x in (self.onnx.Cos(angles), self.onnx.Sin(angles))
        )
        return Angles(positions, cosines, sines, len(frequencies))

    def rotary(self, x: Value, angles: Angles, heads: int) -> Value:
        """Turn each head of [B, Q, H*D] by its token's angles, in float32: element i of its first
        half with element i of the second."""
        wide = self.cast(x, ir.DataType.FLOAT)
        shape = self.constant([0, 0, heads, -1], torch.int64)
        halves = self.onnx.Split(self.onnx.Reshape(wide, shape), num_outputs=2, axis=-1, _outputs=2)
        axis = self.constant([2], torch.int64)
        cosines, sines = (self.onnx.Unsqueeze(v, axis) for v in (angles.cosines, angles.sines))
        first, second = halves
        turned = (
            self.onnx.Sub(self.onnx.Mul(first, cosines), self.onnx.Mul(second, sines)),
            self.onnx.Add(self.onnx.Mul(second, cosines), self.onnx.Mul(first, sines)),
        )
        y = self._as(self._merged(self.onnx.Concat(*turned, axis=-1)), wide)
        return self.cast(y, x.dtype)

    def head_norm(self, x: Value, weight: Value, eps: float) -> Value:
        """Root-mean-square norm of each head of [B, Q, H*D], with one weight [D] for all."""
        split = self.onnx.Reshape(x, self.constant([0, 0, -1, weight.shape[0]], torch.int64))
        normed = self.rms_norm(self._as(split, x), weight, eps)
        return self._as(self._merged(normed), normed)

    def _merged(self, x: Value) -> Value:
        """[B, Q, H, D] -> [B, Q, H*D]."""
        return self.onnx.Reshape(x, self.constant([0, 0, -1], torch.int64))

    # Grouped queries: the heads of a group become queries of one head, which attention reads as it
    # does any others

    def _folded(self, q: Value, groups: Groups | None) -> Value:
        """Queries [B, Q, H*D] -> [B, size * Q, count * D]: of each group, head by head."""
        if groups is None:
            return q
        split = self.constant([0, 0, groups.count, groups.size, groups.head_size], torch.int64)
        by_head = self.onnx.Transpose(self.onnx.Reshape(q, split), perm=[0, 3, 1, 2, 4])
        shape = self.constant([0, -1, groups.count * groups.head_size], torch.int64)
        return self._as(self.onnx.Reshape(by_head, shape), q)

    def _unfolded(self, y: Value, groups: Groups | None) -> Value:
        """What attention gives for folded queries -> [B, Q, H*D]."""
        if groups is None:
            return y
        split = self.constant([0, groups.size, -1, groups.count, groups.head_size], torch.int64)
        by_token = self.onnx.Transpose(self.onnx.Reshape(y, split), perm=[0, 2, 3, 1, 4])
        width = groups.count * groups.size * groups.head_size
        shape = self.constant([0, -1, width], torch.int64)
        return self._as(self.onnx.Reshape(by_token, shape), y)

    def _folded_bias(self, bias: Bias, first_slot: Value, groups: Groups | None) -> Value:
        """``spelled_out``, for folded queries: [B or 1, 1, size * Q, K]."""
        spelled = self.spelled_out(bias, first_slot)
        if groups is None:
            return spelled
        if bias.table is not None:
            raise ValueError("a table of positions has a row for each head: none may be shared")
        key = bias, groups.size
        if key not in self._tiled:
            repeats = self.constant([1, 1, groups.size, 1], torch.int64)
            self._tiled[key] = self._as(self.onnx.Tile(spelled, repeats), spelled)
        return self._tiled[key]
