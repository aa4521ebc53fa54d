"""The vocabulary of ``fastgen.ops`` in plain torch: what a family's graphs mean, in any dtype."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers.activations import ACT2FN

from fastgen.ops.values import Bias, KVSlots


class _Builder:
    def push_module(self, name: str, class_name: str) -> None: ...

    def pop_module(self) -> None: ...


class TorchOps:
    """Eager operations on the model's parameters, cast to ``dtype`` (float32 ones are kept)."""

    def __init__(self, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.builder = _Builder()
        self.dtype = dtype
        self.residual = torch.float32 if dtype == torch.float16 else dtype
        self._parameters = parameters

    def _weight(self, value: Any) -> Tensor:
        weight = self._parameters[value.name].detach()
        return weight.to(self.dtype) if self.dtype == torch.float64 else weight

    def embedding(self, ids: Tensor, weight: Any, scale: float = 1.0, offset: int = 0) -> Tensor:
        return scale * embedding(ids + offset, self._weight(weight)).to(self.residual)

    def linear(self, x: Tensor, weight: Any, bias: Any = None, scale: float = 1.0) -> Tensor:
        w = self._weight(weight)
        y = x.to(w.dtype) @ w.T * scale
        return y if bias is None else y + self._weight(bias)

    head = linear

    def wide_linear(self, x: Tensor, weight: Any) -> Tensor:
        return (x.to(self.residual) @ self._weight(weight).to(self.residual).T).to(self.residual)

    def rms_norm(self, x: Tensor, weight: Any, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return normed.to(self.dtype) * self._weight(weight)

    def add_rms_norm(
        self, residual: Tensor, x: Tensor, weight: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = residual + x.to(self.residual)
        return total, self.rms_norm(total, weight, eps)

    def activation(self, x: Tensor, name: str) -> Tensor:
        return ACT2FN[name](x)

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def position_table(self, weight: Any, buckets: Sequence[int], future: int | None) -> Tensor:
        table = self._weight(weight)[list(buckets)].T.clone()
        if future is not None:
            table[:, future] = float("-inf")
        return table[None]

    def position_bias(self, table: Tensor, q: Tensor, k: Tensor, low: int, high: int) -> Tensor:
        return table[:, :, (k - q).clip(low, high)]

    def mask_bias(self, attention_mask: Tensor) -> Tensor:
        hidden = torch.finfo(self.dtype).min / 2
        return torch.where(attention_mask > 0, 0.0, hidden)[:, None, None].to(self.dtype)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def rows_kept(self, x: Tensor, kept: Tensor) -> Tensor:
        return x[:, kept]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, heads: int, scale: float = 1.0
    ) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = torch.softmax(scale * q @ k.transpose(2, 3) + bias, -1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def cached_attention(
        self, q: Tensor, k: Tensor, v: Tensor, slots: KVSlots, bias: Bias, heads: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        for buffer, new in ((slots.key, k), (slots.value, v)):
            for row, first in enumerate(slots.first_slot.tolist()):
                buffer[row, first : first + new.shape[1]] = new[row]
        distance = bias.slot_positions - bias.query_positions
        added = bias.table[:, :, distance.clip(-bias.reach, 1)]
        added = added if bias.mask is None else added + bias.mask
        y = self.attention(q, slots.key, slots.value, added, heads, scale)
        return y, slots.key, slots.value

    def as_kv(self, x: Tensor, heads: int, head_size: int) -> Tensor:
        return x
