"""The graphs of every family with a decoder, and the names of their tensors.

``encoder``: token ids to hidden states. ``cross``: hidden states to cross-attention keys and
values, computed once per ``generate``. ``decoder``: query tokens over KV cache slots to logits, or
without a head to hidden states. Two have variants that also give what each block reads.
A family without an encoder has the ``decoder`` alone, which reads where rows begin instead.
Axes: B rows, S source tokens, Q query tokens, L slots, H heads, D head size, E width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fastgen.graph import TensorSpec
from fastgen.target import Target

LAST_STATE = "last_hidden_state"
"""The hidden states behind the final norm, in the compute dtype."""


def state_names(layers: int) -> list[str]:
    """What each block reads, in the residual stream's dtype: results of every family's modules."""
    return [f"hidden_state.{layer}" for layer in range(layers)]


@dataclass(frozen=True)
class DecoderShape:
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

    @property
    def output(self) -> tuple[str, int]:
        """Name and width of what a decoder of this shape gives for each query token."""
        if self.vocab_size is None:
            return LAST_STATE, self.width
        return "logits", self.vocab_size

    def same_buffers(self, other: "DecoderShape") -> bool:
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
            return "B", slots, self.heads * self.head_size
        return "B", self.heads, slots, self.head_size


def encoder_specs(
    target: Target, width: int, states: int = 0, more_ids: Sequence[str] = ()
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of the encoder graph.

    Args:
        states: layers whose hidden states are outputs too; 0 leaves them inside.
        more_ids: names of what a family reads beside token ids, one for each.
    """
    inputs = [
        TensorSpec("input_ids", "int64", ("B", "S")),
        TensorSpec("attention_mask", "int64", ("B", "S")),
        TensorSpec("query_positions", "int64", ("S", 1)),
        TensorSpec("key_positions", "int64", (1, "S")),
        *(TensorSpec(name, "int64", ("B", "S")) for name in more_ids),
    ]
    outputs = [TensorSpec(LAST_STATE, target.dtype, ("B", "S", width))]
    axes = "B", "S", width
    outputs += [TensorSpec(name, target.residual_dtype, axes) for name in state_names(states)]
    return inputs, outputs


def packed_specs(
    target: Target, width: int, more_ids: Sequence[str]
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of the encoder graph over T packed tokens (see ``packing.py``)."""
    per_token = "input_ids", "key_positions", *more_ids
    inputs = [
        *(TensorSpec(name, "int64", (1, "T")) for name in per_token),
        TensorSpec("attention_mask", "int64", ("B", "S")),
        TensorSpec("query_positions", "int64", ("S", 1)),
        TensorSpec("places", "int64", ("B", "S")),
        TensorSpec("tokens", "int64", ("T",)),
    ]
    return inputs, [TensorSpec(LAST_STATE, target.dtype, (1, "T", width))]


def cross_specs(target: Target, shape: DecoderShape) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of the cross graph."""
    inputs = [
        TensorSpec("encoder_hidden_states", target.dtype, ("B", "S", shape.width)),
        TensorSpec("attention_mask", "int64", ("B", "S")),
    ]
    outputs = [TensorSpec("cross_mask", target.dtype, ("B", 1, 1, "S"))]
    outputs += [TensorSpec(name, target.dtype, axes) for name, axes in shape.tables.items()]
    kv_axes = shape.kv_axes(target, "S")
    outputs += [TensorSpec(name, target.dtype, kv_axes) for name in shape.kv_names("cross")]
    return inputs, outputs


def decoder_specs(
    target: Target,
    shape: DecoderShape,
    slot_mask: bool,
    slots: int | None = None,
    states: bool = False,
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of the decoder graph.

    Args:
        slot_mask: adds a mask over KV cache slots, as some Targets always do.
        slots: how many slots there are, which Targets of ``static_slots`` must know; None leaves
            the axis free.
        states: makes hidden states outputs too.
    """
    if target.static_slots and slots is None:
        raise ValueError(f"{target.backend} compiles a decoder graph for one number of KV slots")
    length = "L" if slots is None else slots
    first_slot = ("int32", (1,)) if target.appends_in_attention else ("int64", ("B",))
    inputs = [
        TensorSpec("input_ids", "int64", ("B", "Q")),
        TensorSpec("query_positions", "int64", ("Q", 1)),
        TensorSpec("slot_positions", "int64", (1, length)),
        TensorSpec("first_slot", *first_slot),
    ]
    if shape.source:
        inputs.append(TensorSpec("cross_mask", target.dtype, ("B", 1, "Q", "S")))
    else:
        inputs += [TensorSpec("row_start", "int64", ("B", 1)), TensorSpec("kept", "int64", ("K",))]
    if slot_mask or target.always_masked:
        inputs.append(TensorSpec("slot_mask", target.dtype, ("B", 1, "Q", length)))
    inputs += [TensorSpec(name, target.dtype, axes) for name, axes in shape.tables.items()]
    self_axes, cross_axes = shape.kv_axes(target, length), shape.kv_axes(target, "S")
    inputs += [TensorSpec(name, target.dtype, self_axes) for name in shape.kv_names("self")]
    if shape.source:
        inputs += [TensorSpec(name, target.dtype, cross_axes) for name in shape.kv_names("cross")]
    name, width = shape.output
    outputs = [TensorSpec(name, target.dtype, ("B", "Q" if shape.source else "K", width))]
    if states:
        axes = "B", "Q", shape.width
        if name != LAST_STATE:
            outputs.append(TensorSpec(LAST_STATE, target.dtype, axes))
        names = state_names(shape.layers)
        outputs += [TensorSpec(name, target.residual_dtype, axes) for name in names]
    outputs += [TensorSpec(name, target.dtype, self_axes) for name in shape.kv_names("present")]
    return inputs, outputs
