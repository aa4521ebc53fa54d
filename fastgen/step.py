"""What a decoder-only family writes its layers with: a Step, made here of the graph's inputs."""

from typing import Any

from onnxscript import nn

from fastgen.ops import KVSlots, Ops, Value
from fastgen.seq2seq import LAST_STATE, DecoderShape


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

    shape: DecoderShape

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
