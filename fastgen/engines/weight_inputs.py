"""A Graph whose parameters are inputs: an engine that would copy initializers gets pointers."""

import onnx

from fastgen.graphs.graph import Graph


def weights_as_inputs(graph: Graph, but: tuple[str, ...] = ()) -> bytes:
    """The Graph's ONNX bytes with each parameter as an input of the same name, type and shape.

    Args:
        but: parameters that remain initializers.
    """
    model = onnx.load_from_string(graph.onnx)
    weights = set(graph.parameters) - set(but)
    kept = []
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(
                    initializer.name, initializer.data_type, list(initializer.dims)
                )
            )
        else:
            kept.append(initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    data: bytes = model.SerializeToString()
    return data


def in_place(graph: Graph) -> dict[str, str]:
    """Outputs that are updated inputs, as ``{output: input}``: the KV buffers."""
    nodes = onnx.load_from_string(graph.onnx).graph.node
    return {n.output[0]: n.input[0] for n in nodes if n.op_type == "TensorScatter"}
