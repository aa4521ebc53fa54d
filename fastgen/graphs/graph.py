"""From a family's onnxscript module to a Graph: ONNX bytes, tensor specs, parameter names."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from fastgen.blockwise import Format
from fastgen.ops.quantised import FORM, lowering
from fastgen.target import Target

# Initializers name this file; their data comes by pointer. It must exist and is not read: so it is
# the empty file that is always there, and that nobody can remove.
WEIGHTS_FILE = os.path.basename(os.devnull)

IR_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (torch's name) and shape of a Graph's input or output; a str is a free axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """A computation ready for an engine to compile; no weight is inside."""

    onnx: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: tuple[str, ...]
    """Names of the torch parameters (in the HF module) that are this graph's initializers, and of
    what is made of some (``blockwise.Format.names``, ``int8.Rows.names``)."""

    def meta(self) -> dict[str, Any]:
        """Everything but the bytes, as JSON-able data."""
        return {
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(spec) for spec in self.outputs],
            "parameters": list(self.parameters),
        }

    def operators(self) -> dict[str, int]:
        """How many operators of each kind there are, the most frequent first."""
        nodes = onnx.load_from_string(self.onnx).graph.node
        kinds = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes)
        return dict(kinds.most_common())

    @classmethod
    def from_meta(cls, onnx: bytes, meta: Mapping[str, Any]) -> "Graph":
        """The inverse of ``meta``."""

        def specs(rows: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(r["name"], r["dtype"], tuple(r["shape"])) for r in rows)

        parameters = tuple(meta["parameters"])
        return cls(onnx, specs(meta["inputs"]), specs(meta["outputs"]), parameters)


def build(
    module: nn.Module,
    target: Target,
    parameters: Mapping[str, tuple[str, tuple[int, ...]]],
    call: Callable[..., Mapping[str, ir.Value]],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    held: Mapping[str, Format] = MappingProxyType({}),
) -> Graph:
    """Trace ``call(ops, **inputs)``, which uses ``module``'s children, into a Graph.

    Args:
        module: tree whose parameter names are those of the HF module.
        parameters: dtype and shape of the HF module's parameters, by name.
        call: builds the computation; returns the graph's outputs by name.
        held: the formats of parameters that the HF module has in fewer bits.
    """
    opsets = {"": target.opset} | ({"com.microsoft": 1} if target.contrib else {})
    graph = ir.Graph([], [], nodes=[], name="fastgen", opset_imports=opsets)
    _name_parameters(module, parameters, held)
    builder = GraphBuilder(graph)
    values = {s.name: builder.input(s.name, IR_DTYPES[s.dtype], list(s.shape)) for s in inputs}
    ops = lowering(builder, target)
    results = call(ops, **values)
    for spec in outputs:
        value = ops.output(results[spec.name], IR_DTYPES[spec.dtype])
        value.type, value.shape = ir.TensorType(IR_DTYPES[spec.dtype]), ir.Shape(spec.shape)
        builder.add_output(value, spec.name)
    used = _by_pointer(graph, module, ops.made.values())
    model = ir.Model(graph, ir_version=11, producer_name="fastgen")
    onnx = ir.to_proto(model).SerializeToString()
    return Graph(onnx, tuple(inputs), tuple(outputs), used)


def _name_parameters(
    module: nn.Module,
    parameters: Mapping[str, tuple[str, tuple[int, ...]]],
    held: Mapping[str, Format],
) -> None:
    """Give each parameter its full name and type, whichever method of its module uses it."""
    for name, parameter in module.named_parameters():
        dtype, shape = parameters[name]
        parameter.name = name
        if name in held:
            parameter.meta[FORM] = held[name]
        parameter.type, parameter.shape = ir.TensorType(IR_DTYPES[dtype]), ir.Shape(shape)
        parameter._realized = True  # onnxscript would name it after the calls that lead to it


def _by_pointer(graph: ir.Graph, module: nn.Module, made: Iterable[ir.Value]) -> tuple[str, ...]:
    """Declare parameters that are used, and what is made of some, as external data, whose place an
    engine fills with a pointer."""
    names = []
    for value in (*(p for _, p in module.named_parameters() if p.uses()), *made):
        name = str(value.name)
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, 0, None, value.dtype, shape=value.shape, name=name, base_dir=""
        )
        graph.register_initializer(value)
        names.append(name)
    return tuple(names)
