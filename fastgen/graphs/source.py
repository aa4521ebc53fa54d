"""The tensors of the cross graph: what a decoder reads of its source."""

from fastgen.graphs.graph import TensorSpec
from fastgen.graphs.shape import Shape
from fastgen.target import Target


def cross_specs(target: Target, shape: Shape) -> tuple[list[TensorSpec], list[TensorSpec]]:
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
