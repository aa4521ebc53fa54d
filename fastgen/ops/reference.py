"""The vocabulary of ``ops/`` in plain torch: what a family's graphs mean, and what float16 loses.

A family's modules run through ``ReferenceOps`` unchanged, over whole tensors in float32: slow, and
the reference of every lowering. With a ``watch``, each operation is also computed as the float16
graphs do, of the same numbers: factors and results are float16 where neither a rule nor the
Target's choice wants float32, sums are float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding, gelu, layer_norm, silu

from fastgen.errors import UnsupportedConfigError
from fastgen.ops import names
from fastgen.ops.standard import WIDE_SCALE
from fastgen.ops.values import Angles, Bias, KVSlots
from fastgen.target import Target

LARGEST = torch.finfo(torch.float16).max
_HIDDEN = torch.finfo(torch.float16).min / 2

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": gelu,
    "gelu_new": lambda x: gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
    "silu": silu,
    "swish": silu,
    "tanh": torch.tanh,
}

Round = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Known:
    """Numbers, float32, and what gave them."""

    tensor: torch.Tensor
    name: str = ""
    """Of the operation; empty for what no operation gave."""
    wide: bool = False
    """Whether float16 graphs hold them in float32."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One operation, as a watch is told of it."""

    name: str
    kind: str
    reads: tuple[Known, ...]
    exact: torch.Tensor
    """What it gives."""
    low: torch.Tensor
    """What it gives in a float16 graph."""
    inside: float = 0.0
    """The largest of its numbers that are neither read nor given: attention's scores."""


def half(x: torch.Tensor) -> torch.Tensor:
    """float32, rounded to float16: infinite where it overflows."""
    return x.to(torch.float16).float()


def same(x: torch.Tensor) -> torch.Tensor:
    return x


class ReferenceOps:
    """The methods are those of ``ops.Ops``; integers are plain tensors, other values ``Known``."""

    def __init__(
        self,
        target: Target,
        parameters: Mapping[str, torch.Tensor],
        watch: Callable[[Seen], None] | None = None,
        rounded: bool = False,
        clamped: bool = True,
    ) -> None:
        """
        Args:
            target: says by ``wide`` what float16 graphs keep in float32.
            parameters: the model's, by name.
            watch: told of each operation.
            rounded: go on with what float16 graphs compute, not with what is right.
            clamped: whether float16 results of products and activations stay finite.
        """
        self.builder = names.Builder()
        self._choice = names.Choice(target)
        self._float16 = target.dtype == "float16"
        self._parameters, self._watch = parameters, watch
        self._rounded, self._clamped = rounded, clamped
        mixed = any(p.dtype == torch.float16 for p in parameters.values())
        wide = {name for name, p in parameters.items() if mixed and p.dtype == torch.float32}
        self._kept = frozenset(wide)
        """Weights that are float32 in a float16 model, as transformers may load it."""

    # Operations

    def _weight(self, value: Any) -> torch.Tensor:
        weight = self._parameters[value.name].detach()
        narrow = self._float16 and value.name not in self._kept
        return half(weight.float()) if narrow else weight.float()

    def _run(
        self,
        kind: str,
        name: str,
        reads: Sequence[Known],
        compute: Callable[..., torch.Tensor],
        rule: bool = False,
        clamp: bool = False,
        inside: Callable[[], float] = lambda: 0.0,
    ) -> Known:
        """An operation's result.

        Args:
            compute: called with a function that rounds what float16 graphs hold in float16, and the
                tensors that are read; gives float32.
            rule: whether its result is float32 where nothing was chosen.
            clamp: whether a float16 result is kept finite.
            inside: gives ``Seen.inside``, when all is computed.
        """
        wide = self._choice.wide(name, rule)
        exact = low = None
        if not self._rounded:
            exact = compute(same, *(x.tensor for x in reads))
            if self._watch is None:
                return Known(exact, name, wide)
        low = compute(half, *(x.tensor if x.wide else half(x.tensor) for x in reads))
        if not wide:
            low = half(low.clamp(-LARGEST, LARGEST) if clamp and self._clamped else low)
        if self._watch is not None:
            right = low if exact is None else exact
            self._watch(Seen(name, kind, tuple(reads), right, low, inside()))
        return Known(low if exact is None else exact, name, wide)

    def embedding(
        self, ids: torch.Tensor, weight: Any, scale: float = 1.0, offset: int = 0
    ) -> Known:
        rows = scale * embedding(ids + offset, self._weight(weight))
        name = names.of_parameter(weight)
        return self._run("embedding", name, (), lambda r: rows, rule=True)

    def linear(
        self,
        x: Known,
        weight: Any,
        bias: Any = None,
        scale: float = 1.0,
        transposed: bool = False,
        wide: bool = False,
    ) -> Known:
        name, matrix = names.of_parameter(weight), self._weight(weight)
        factor = matrix if transposed else matrix.T
        addend = 0.0 if bias is None else self._weight(bias)
        exact = weight.name in self._kept or names.product(name) in self._choice
        ranged, unbounded = self._choice.wide(name, wide), x.wide

        def compute(r: Round, x: torch.Tensor) -> torch.Tensor:
            if r is same or exact:
                return scale * (x @ factor) + addend
            if not ranged:
                return r(scale * x) @ factor + addend
            if unbounded:
                return r(r(scale * x * WIDE_SCALE) @ factor) / WIDE_SCALE + addend
            return r(WIDE_SCALE * (r(scale * x) @ factor)) / WIDE_SCALE + addend

        return self._run("linear", name, [x], compute, rule=wide)

    def wide_linear(self, x: Known, weight: Any) -> Known:
        return self.linear(x, weight, wide=True)

    def rms_norm(self, x: Known, weight: Any, eps: float) -> Known:
        factor = self._weight(weight)

        def compute(r: Round, x: torch.Tensor) -> torch.Tensor:
            return factor * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

        return self._run("norm", names.of_parameter(weight), [x], compute)

    def layer_norm(self, x: Known, weight: Any, bias: Any, eps: float) -> Known:
        factors = self._weight(weight), self._weight(bias)

        def compute(r: Round, x: torch.Tensor) -> torch.Tensor:
            return layer_norm(x, x.shape[-1:], *factors, eps)

        return self._run("norm", names.of_parameter(weight), [x], compute)

    def head_norm(self, x: Known, weight: Any, eps: float) -> Known:
        size = self._parameters[weight.name].shape[0]
        split = Known(x.tensor.unflatten(-1, (-1, size)), x.name, x.wide)
        normed = self.rms_norm(split, weight, eps)
        return Known(normed.tensor.flatten(-2), normed.name, normed.wide)

    def _sum(self, residual: Known, x: Known, norm: Any) -> Known:
        name = names.total(names.of_parameter(norm))
        return self._run("sum", name, [residual, x], lambda r, a, b: a + b, rule=True)

    def add_rms_norm(
        self, residual: Known, x: Known, weight: Any, eps: float
    ) -> tuple[Known, Known]:
        total = self._sum(residual, x, weight)
        return total, self.rms_norm(total, weight, eps)

    def add_layer_norm(
        self, residual: Known, x: Known, weight: Any, bias: Any, eps: float
    ) -> tuple[Known, Known]:
        total = self._sum(residual, x, weight)
        return total, self.layer_norm(total, weight, bias, eps)

    def activation(self, x: Known, name: str) -> Known:
        if name not in _ACTIVATIONS:
            raise UnsupportedConfigError(f"activation {name!r}: one of {', '.join(_ACTIVATIONS)}.")
        function, own = _ACTIVATIONS[name], names.activation(x.name)
        return self._run("activation", own, [x], lambda r, x: function(x), clamp=True)

    def multiply(self, x: Known, y: Known) -> Known:
        own = names.multiply(x.name)
        return self._run("multiply", own, [x, y], lambda r, x, y: x * y, clamp=True)

    def add(self, x: Known, y: Known) -> Known:
        name = names.add(x.name, y.name)
        if not name:
            return Known(x.tensor + y.tensor)
        rule = x.wide or y.wide
        return self._run("add", name, [x, y], lambda r, x, y: x + y, rule)

    # What is not computed

    def split(self, x: Known, parts: int) -> list[Known]:
        return [Known(piece, x.name, x.wide) for piece in x.tensor.chunk(parts, dim=-1)]

    def rows_kept(self, x: Known, kept: torch.Tensor) -> Known:
        return Known(x.tensor[:, kept], x.name, x.wide)

    def spread(self, x: Known, places: torch.Tensor) -> Known:
        return Known(x.tensor[0, places], x.name, x.wide)

    def pack(self, x: Known, tokens: torch.Tensor) -> Known:
        return Known(x.tensor.flatten(0, 1)[tokens][None], x.name, x.wide)

    def as_residual(self, x: Known) -> Known:
        return x

    def as_kv(self, x: Known, heads: int, head_size: int) -> Known:
        return x

    def constant(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype)

    # Positions and biases

    def rotary_angles(
        self, positions: torch.Tensor, frequencies: Sequence[float], scale: float = 1.0
    ) -> Angles:
        rates = torch.tensor([*frequencies], device=positions.device)
        angles = positions[..., None].float() * rates
        return Angles(positions, scale * angles.cos(), scale * angles.sin(), len(frequencies))

    def rotary(self, x: Known, angles: Angles, heads: int) -> Known:
        """Of what float16 graphs hold in float16, as ONNX Runtime's kernel gives it."""
        first, second = x.tensor.unflatten(-1, (heads, -1)).chunk(2, dim=-1)
        cosines, sines = (turns[:, :, None] for turns in (angles.cosines, angles.sines))
        turned = first * cosines - second * sines, second * cosines + first * sines
        return Known(torch.cat(turned, dim=-1).flatten(-2), x.name)

    def position_table(self, weight: Any, buckets: Sequence[int], future: int | None) -> Known:
        table = self._weight(weight)[list(buckets)].T.clone()
        if future is not None:
            table[:, future] = float("-inf")
        return Known(table[None])

    def position_bias(
        self, table: Known, queries: torch.Tensor, keys: torch.Tensor, low: int, high: int
    ) -> Known:
        return Known(table.tensor[:, :, (keys - queries).clamp(low, high)])

    def mask_bias(self, attention_mask: torch.Tensor) -> Known:
        return Known(torch.where(attention_mask != 0, 0.0, _HIDDEN)[:, None, None])

    def causal_bias(self, queries: torch.Tensor, keys: torch.Tensor) -> Known:
        return Known(torch.where(keys > queries, float("-inf"), 0.0)[None, None])

    def row_positions(
        self, query_positions: torch.Tensor, row_start: torch.Tensor | None
    ) -> torch.Tensor:
        positions = query_positions.reshape(1, -1)
        return positions if row_start is None else (positions - row_start).clamp(min=0)

    def for_queries(self, mask: Known, query_positions: torch.Tensor) -> Known:
        return Known(mask.tensor.expand(-1, -1, len(query_positions), -1))

    def _spelled(self, bias: Bias) -> Known:
        queries, slots = bias.query_positions, bias.slot_positions
        if bias.table is None:
            total = self.causal_bias(queries, slots)
        else:
            total = self.position_bias(bias.table, queries, slots, -bias.reach, 1)
        if bias.row_start is not None:
            total = self.add(total, self.mask_bias(slots >= bias.row_start))
        return total if bias.mask is None else self.add(total, bias.mask)

    # Attention

    def attention(
        self, q: Known, k: Known, v: Known, bias: Known | None, heads: int, scale: float = 1.0
    ) -> Known:
        """Of keys and values [B, K, H*D]."""
        name, largest = names.attention(q.name), 0.0
        wide = name in self._choice

        def compute(r: Round, *qkv: torch.Tensor) -> torch.Tensor:
            nonlocal largest
            r = same if wide else r
            q, k, v = (r(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv)
            scores = scale * (q @ k.transpose(2, 3))
            if r is same:
                largest = max(largest, float(scores.abs().amax()))
            scores = r(scores if bias is None else r(scores) + bias.tensor)
            y = r(torch.softmax(scores, -1)) @ v
            return y.transpose(1, 2).flatten(2)

        return self._run("attention", name, [q, k, v], compute, inside=lambda: largest)

    def cached_attention(
        self,
        q: Known,
        k: Known,
        v: Known,
        slots: KVSlots,
        bias: Bias,
        heads: int,
        scale: float = 1.0,
    ) -> tuple[Known, Known, Known]:
        """Of KV buffers [B, L, H*D], which hold float16, and stay as they were."""
        first = int(slots.first_slot.flatten()[0])

        def written(buffer: Known, new: Known) -> Known:
            rows = buffer.tensor.clone()
            rows[:, first : first + new.tensor.shape[1]] = new.tensor
            return Known(rows, new.name)

        def shared(x: Known) -> Known:
            if (groups := slots.groups) is None:
                return x
            split = x.tensor.unflatten(-1, (groups.count, groups.head_size))
            return Known(split.repeat_interleave(groups.size, dim=2).flatten(-2), x.name)

        key, value = written(slots.key, k), written(slots.value, v)
        y = self.attention(q, shared(key), shared(value), self._spelled(bias), heads, scale)
        return y, key, value
