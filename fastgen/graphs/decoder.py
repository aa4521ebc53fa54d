"""What a decoder-only family writes its layers with: a Step, made here of the graph's inputs."""

from typing import Any

from onnxscript import nn

from fastgen.graphs.graph import TensorSpec
from fastgen.graphs.shape import LAST_STATE, Shape, state_names
from fastgen.ops.standard import Ops
from fastgen.ops.values import KVSlots, Value
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


class Step:
    """Query tokens over KV cache slots, in the decoder graph of one family."""

    def __init__(
        self,
        op: Ops,
        input_ids: Value,
        query_positions: Value,
        slot_positions: Value,
        first_slot: Value,
        row_start: Value,
        slot_mask: Value | None = None,
        **buffers: Value,
    ) -> None:
        """The arguments are the inputs of ``decoder_specs`` without a source."""
        self.ids = input_ids
        """Token ids [B, Q]."""
        self.positions = op.row_positions(query_positions, row_start)
        """Positions in their rows [B, Q], at least 0."""
        self.results: dict[str, Value] = {}
        """What the graph gives, by name."""
        self._buffers, self._first_slot = buffers, first_slot
        places = op.visible_slots(slot_positions, input_ids, first_slot, axis=1)
        self._bias = op.causal_bias(query_positions, places, row_start)
        if slot_mask is not None:
            mask = op.visible_slots(slot_mask, input_ids, first_slot, axis=3)
            self._bias = op.add(self._bias, mask)
        self._layers = self._states = 0

    def reads(self, residual: Value) -> None:
        """Say what the next block reads: its hidden state."""
        self.results[f"hidden_state.{self._states}"] = residual
        self._states += 1

    def attend(
        self, op: Ops, q: Value, k: Value, v: Value, heads: int, scale: float = 1.0
    ) -> Value:
        """The next layer's attention of [B, Q, H*D] queries over all tokens so far: writes the KV
        slots of its keys and values."""
        layer = self._layers
        self._layers += 1
        slots = KVSlots(
            self._buffers[f"self_key.{layer}"],
            self._buffers[f"self_value.{layer}"],
            self._first_slot,
        )
        y, key, value = op.cached_attention(q, k, v, slots, self._bias, heads, scale)
        self.results |= {f"present_key.{layer}": key, f"present_value.{layer}": value}
        return y


class DecoderRoot(nn.Module):
    """Base of a decoder-only family's graph: a subclass gives ``shape``, ``hidden``, ``head``."""

    shape: Shape

    def hidden(self, op: Ops, step: Step) -> Value:
        """Hidden states [B, Q, E] behind the final norm."""
        raise NotImplementedError

    def head(self, op: Ops, hidden: Value) -> Value:
        """Hidden states [B, K, E] -> logits [B, K, V]."""
        raise NotImplementedError

    def decode(self, op: Ops, kept: Value, **inputs: Any) -> dict[str, Value]:
        """Query tokens [B, Q] over KV cache slots -> logits [B, K, V] of those that are kept,
        hidden states and the KV buffers."""
        step = Step(op, **inputs)
        hidden = self.hidden(op, step)
        logits = self.head(op, op.rows_kept(hidden, kept))
        return step.results | {LAST_STATE: hidden, "logits": logits}
