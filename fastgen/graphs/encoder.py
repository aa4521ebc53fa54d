"""The tensors of the encoder graph, as it is and over packed tokens."""

from collections.abc import Sequence

from fastgen.graphs.graph import TensorSpec
from fastgen.graphs.shape import LAST_STATE, state_names
from fastgen.target import Target


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
