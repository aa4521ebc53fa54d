"""The tensors of the encoder graph, as it is and over packed tokens, and what a family without an
encoder writes its layers with where they run as one."""

from collections.abc import Sequence

from fastgen.graphs.graph import TensorSpec
from fastgen.graphs.shape import LAST_STATE, state_names
from fastgen.ops.standard import Ops
from fastgen.ops.values import Value
from fastgen.target import Target

POOLED = "pooler_output"
"""What a pooler makes of each row."""


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


def pooler_specs(target: Target, width: int) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of the graph of an encoder's pooler."""
    inputs = [TensorSpec(LAST_STATE, target.dtype, ("B", "S", width))]
    return inputs, [TensorSpec(POOLED, target.dtype, ("B", 1, width))]


class WholeRows:
    """All tokens of rows at once, each of which sees those before it: in place of a Step, where no
    keys and values are kept."""

    def __init__(
        self,
        op: Ops,
        input_ids: Value,
        query_positions: Value,
        key_positions: Value,
        attention_mask: Value,
        places: Value | None = None,
        tokens: Value | None = None,
    ) -> None:
        """The arguments are the inputs of ``encoder_specs``, or of ``packed_specs``."""
        self.ids, self.positions = input_ids, key_positions
        self.results: dict[str, Value] = {}
        """Hidden states of the layers, by name."""
        mask = op.for_queries(op.mask_bias(attention_mask), query_positions)
        columns = op.row_positions(query_positions, None)
        self._bias = op.add(op.causal_bias(query_positions, columns), mask)
        self._places, self._tokens = places, tokens

    def reads(self, residual: Value) -> None:
        """Say what the next block reads: its hidden state."""
        self.results[f"hidden_state.{len(self.results)}"] = residual

    def attend(
        self, op: Ops, q: Value, k: Value, v: Value, heads: int, scale: float = 1.0
    ) -> Value:
        """A layer's attention of [B, S, H*D] queries over what is before them, and themselves."""
        if self._places is not None:
            q, k, v = (op.spread(x, self._places) for x in (q, k, v))
        y = op.attention(q, k, v, self._bias, heads, scale)
        return y if self._tokens is None else op.pack(y, self._tokens)
