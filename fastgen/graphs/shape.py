"""The graphs of every family with a decoder, and the names of their tensors.

``encoder``: token ids to hidden states. ``cross``: hidden states to cross-attention keys and
values, computed once per ``generate``. ``decoder``: query tokens over KV cache slots to logits, or
without a head to hidden states. Two have variants that also give what each block reads.
A family without an encoder has the ``decoder`` alone, which reads where rows begin instead.
Axes: B rows, S source tokens, Q query tokens, L slots, H heads, D head size, E width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fastgen.ops.values import Groups
from fastgen.target import Target

LAST_STATE = "last_hidden_state"
"""The hidden states behind the final norm, in the compute dtype."""


def state_names(layers: int) -> list[str]:
    """What each block reads, in the residual stream's dtype: results of every family's modules."""
    return [f"hidden_state.{layer}" for layer in range(layers)]


@dataclass(frozen=True)
class Shape:
    """The sizes that KV buffers and graph specs are made of."""

    layers: int
    heads: int
    head_size: int
    width: int
    vocab_size: int | None
    """None where there is no head: the decoder's hidden states are what it gives."""
    tables: Mapping[str, tuple[int, ...]]
    """Tensors in the compute dtype that the cross graph computes once and the decoder reads."""
    source: bool = True
    """Whether it attends to an encoder; if not, rows may begin behind the first slot."""
    positions: int | None = None
    """How many positions a row may have; None if a position is no place in a table."""
    kv_heads: int | None = None
    """Heads of keys and values, where several query heads share one; None: as many as ``heads``."""

    @property
    def stored_heads(self) -> int:
        """Heads that KV buffers hold."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def groups(self) -> Groups | None:
        """How query heads share those of keys and values; None where each has its own."""
        if self.stored_heads == self.heads:
            return None
        return Groups(self.stored_heads, self.heads // self.stored_heads, self.head_size)

    @property
    def output(self) -> tuple[str, int]:
        """Name and width of what a decoder of this shape gives for each query token."""
        if self.vocab_size is None:
            return LAST_STATE, self.width
        return "logits", self.vocab_size

    def same_buffers(self, other: "Shape") -> bool:
        """Whether the KV buffers and tables of one are those of the other."""
        return self is other or replace(self, vocab_size=None) == replace(other, vocab_size=None)

    def kv_names(self, prefix: str) -> Iterator[str]:
        """``{prefix}_key.0, {prefix}_value.0, {prefix}_key.1, ...``: the order of KV buffers."""
        for layer in range(self.layers):
            yield f"{prefix}_key.{layer}"
            yield f"{prefix}_value.{layer}"

    def kv_axes(self, target: Target, slots: int | str) -> tuple[int | str, ...]:
        """A KV buffer as graphs see it: attention in BLHD layout wants H and D merged."""
        if target.kv_layout == "BLHD":
            return "B", slots, self.stored_heads * self.head_size
        return "B", self.stored_heads, slots, self.head_size
