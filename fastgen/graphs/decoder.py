"""The decoder graph: its tensors, and what a family writes its layers with, a Step.

A family's ``DecoderRoot`` computes hidden states and logits; the graph's inputs and outputs, KV
slots and source are made and handed to it here.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from onnxscript import nn

from fastgen.graphs.graph import TensorSpec
from fastgen.graphs.shape import LAST_STATE, Shape, state_names
from fastgen.ops.standard import Ops
from fastgen.ops.values import Bias, KVSlots, Value
from fastgen.target import Target


def decoder_specs(
    target: Target,
    shape: Shape,
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
        inputs.append(TensorSpec("row_start", "int64", ("B", 1)))
    if shape.vocab_size is not None:
        inputs.append(TensorSpec("kept", "int64", ("K",)))
    if slot_mask or target.always_masked:
        inputs.append(TensorSpec("slot_mask", target.dtype, ("B", 1, "Q", length)))
    inputs += [TensorSpec(name, target.dtype, axes) for name, axes in shape.tables.items()]
    self_axes, cross_axes = shape.kv_axes(target, length), shape.kv_axes(target, "S")
    inputs += [TensorSpec(name, target.dtype, self_axes) for name in shape.kv_names("self")]
    if shape.source:
        inputs += [TensorSpec(name, target.dtype, cross_axes) for name in shape.kv_names("cross")]
    name, width = shape.output
    rows = "Q" if shape.vocab_size is None else "K"
    outputs = [TensorSpec(name, target.dtype, ("B", rows, width))]
    if states:
        axes = "B", "Q", shape.width
        if name != LAST_STATE:
            outputs.append(TensorSpec(LAST_STATE, target.dtype, axes))
        names = state_names(shape.layers)
        outputs += [TensorSpec(name, target.residual_dtype, axes) for name in names]
    outputs += [TensorSpec(name, target.dtype, self_axes) for name in shape.kv_names("present")]
    return inputs, outputs


class Step:
    """Query tokens over KV cache slots, in the decoder graph of one family."""

    def __init__(
        self,
        op: Ops,
        shape: Shape,
        input_ids: Value,
        query_positions: Value,
        slot_positions: Value,
        first_slot: Value,
        row_start: Value | None = None,
        slot_mask: Value | None = None,
        **buffers: Value,
    ) -> None:
        """The arguments are the inputs of ``decoder_specs``."""
        self.ids = input_ids
        """Token ids [B, Q]."""
        self.results: dict[str, Value] = {}
        """What the graph gives, by name."""
        self._op, self._shape = op, shape
        self._bias = Bias(query_positions, slot_positions, row_start, slot_mask)
        self._buffers, self._first_slot = buffers, first_slot
        self._with_tables: dict[int, Bias] = {}
        self._layers = self._cross_layers = self._states = 0

    @cached_property
    def positions(self) -> Value:
        """Positions in their rows [B, Q], at least 0; with a source [1, Q]."""
        return self._op.row_positions(self._bias.query_positions, self._bias.row_start)

    def reads(self, residual: Value) -> None:
        """Say what the next block reads: its hidden state."""
        self.results[f"hidden_state.{self._states}"] = residual
        self._states += 1

    def attend(
        self,
        op: Ops,
        q: Value,
        k: Value,
        v: Value,
        heads: int,
        scale: float = 1.0,
        table: int | None = None,
    ) -> Value:
        """The next layer's attention of [B, Q, H*D] queries over all tokens so far: writes the KV
        slots of its keys and values, which have the heads that ``Shape.kv_heads`` says.

        Args:
            table: which of the family's position tables is added to the scores; None: none.
        """
        layer = self._layers
        self._layers += 1
        slots = KVSlots(
            self._buffers[f"self_key.{layer}"],
            self._buffers[f"self_value.{layer}"],
            self._first_slot,
            self._shape.groups,
        )
        bias = self._bias if table is None else self._with_table(table)
        y, key, value = op.cached_attention(q, k, v, slots, bias, heads, scale)
        self.results |= {f"present_key.{layer}": key, f"present_value.{layer}": value}
        return y

    def _with_table(self, index: int) -> Bias:
        if index not in self._with_tables:
            name, axes = [*self._shape.tables.items()][index]
            reach = axes[-1] - 2  # distances 0, 1 and -reach .. -1
            bias = replace(self._bias, table=self._buffers[name], reach=reach)
            self._with_tables[index] = bias
        return self._with_tables[index]

    def attend_source(self, op: Ops, q: Value, heads: int, scale: float = 1.0) -> Value:
        """The next layer's attention of [B, Q, H*D] queries over the source."""
        layer = self._cross_layers
        self._cross_layers += 1
        key, value = (self._buffers[f"cross_{name}.{layer}"] for name in ("key", "value"))
        return op.attention(q, key, value, self._buffers["cross_mask"], heads, scale)


class DecoderRoot(nn.Module):
    """Base of a family's decoder: a subclass gives ``shape``, ``hidden``, and unless it is a stack
    alone ``head``; with a source ``source``, and ``tables`` if it has any."""

    shape: Shape

    def hidden(self, op: Ops, step: Step) -> Value:
        """Hidden states [B, Q, E] behind the final norm."""
        raise NotImplementedError

    def head(self, op: Ops, hidden: Value) -> Value:
        """Hidden states [B, K, E] -> logits [B, K, V]."""
        raise NotImplementedError

    def source(self, op: Ops, encoded: Value) -> Sequence[tuple[Value, Value]]:
        """The encoder's hidden states [B, S, E] -> each layer's keys and values [B, S, H*D]."""
        raise NotImplementedError

    def tables(self, op: Ops) -> Sequence[Value]:
        """Position tables [1, H, T], as many as ``shape.tables`` names."""
        return ()

    def cross(
        self, op: Ops, encoder_hidden_states: Value, attention_mask: Value
    ) -> dict[str, Value]:
        """The cross graph: what stays the same for all tokens of one ``generate``."""
        results = {"cross_mask": op.mask_bias(attention_mask)}
        results |= zip(self.shape.tables, self.tables(op), strict=True)
        heads, head_size = self.shape.stored_heads, self.shape.head_size
        for layer, kv in enumerate(self.source(op, encoder_hidden_states)):
            key, value = (op.as_kv(x, heads, head_size) for x in kv)
            results |= {f"cross_key.{layer}": key, f"cross_value.{layer}": value}
        return results

    def decode(self, op: Ops, kept: Value | None = None, **inputs: Any) -> dict[str, Value]:
        """The decoder graph: query tokens [B, Q] over KV cache slots -> hidden states, the KV
        buffers, and where there is a head logits [B, K, V] of the tokens that are kept."""
        step = Step(op, self.shape, **inputs)
        hidden = self.hidden(op, step)
        results = step.results | {LAST_STATE: hidden}
        if self.shape.vocab_size is not None:
            results["logits"] = self.head(op, op.rows_kept(hidden, kept))
        return results
