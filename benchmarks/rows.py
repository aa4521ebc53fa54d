"""What a product of many rows takes by weights of fewer bits on this machine's CPU, as a table.

    python -m benchmarks.rows [--outputs 2048] [--inputs 512] [--threads 2]

Microseconds of one product [rows, inputs] x [outputs, inputs] by ONNX Runtime, as engines run it:
full weights in float32 as an engine reads them unpacked, and MatMulNBits. Median of 0.3 s.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from fastgen import runtime
from fastgen.blockwise import BITS, GROUPS, KINDS, quantise

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = 0.3


def session(kind: str, outputs: int, inputs: int, threads: int) -> Any:
    """A session of one product by a random weight: ``full``, or of fewer bits."""
    ort = runtime.onnxruntime()
    weight = torch.randn(outputs, inputs)
    where = {"domain": "com.microsoft"}
    if kind == "full":
        values = {"w": weight}
        node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], transB=1, **where)
    else:
        blocks = quantise(weight, kind)  # type: ignore[arg-type]
        values = {"w": blocks.values, "s": blocks.scales}
        sizes = {"K": inputs, "N": outputs, "bits": BITS[kind], "block_size": GROUPS[kind]}
        names = ["x", "w", "s"]
        node = helper.make_node("MatMulNBits", names, ["y"], accuracy_level=4, **sizes, **where)
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", inputs), ("y", outputs))
    )
    constants = [numpy_helper.from_array(v.numpy(), name) for name, v in values.items()]
    if kind == "full":  # an input, as an engine's: a constant would be packed
        given = helper.make_tensor_value_info("w", TensorProto.FLOAT, [outputs, inputs])
        graph = helper.make_graph([node], "product", [x, given], [y], constants)
    else:
        graph = helper.make_graph([node], "product", [x], [y], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(model.SerializeToString(), settings, providers=providers)


def microseconds(product: Any, rows: int, inputs: int) -> float:
    """The median of one product of that many rows."""
    given = {"x": np.random.default_rng(0).standard_normal((rows, inputs), dtype=np.float32)}
    product.run(None, given)
    seconds: list[float] = []
    while sum(seconds) < _SECONDS:
        start = time.perf_counter()
        product.run(None, given)
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    print("| rows |", " | ".join(map(str, ROWS)), "|\n" + (len(ROWS) + 1) * "|---" + "|")
    for kind in ("full", *(kind for kind in KINDS if kind in BITS)):
        product = session(kind, options.outputs, options.inputs, options.threads)
        times = (f"{microseconds(product, rows, options.inputs):.0f}" for rows in ROWS)
        print(f"| `{kind}` |", " | ".join(times), "|", flush=True)


if __name__ == "__main__":
    main()
