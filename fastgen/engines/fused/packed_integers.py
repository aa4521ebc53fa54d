"""Products of packed rows as 8-bit integers, by weights with a step for each output.

One kernel computes them where tensor cores are those of Hopper (packed_int8.py). Elsewhere cuBLAS
adds them up in 32 bits, and a kernel of encoder_int8.cu makes of the sums what is wanted.
"""

import ctypes
from collections.abc import Sequence

import torch

from fastgen.engines import NotFused
from fastgen.engines.fused.packed_int8 import Int8Product, Int8Weight, check
from fastgen.engines.fused.packed_kernels import (
    ACTIVATIONS,
    Kernel,
    LeavesRows,
    OutArgs,
    pointer,
)
from fastgen.engines.fused.packed_products import Product
from fastgen.engines.fused.packed_values import VECTOR, Buffer, Rounded, Size

SOURCE = "encoder_int8.cu"
MAX_WIDTH = 32768  # of a row that is rounded alone: what a block holds
LEAST_ROWS = 32  # cuBLAS multiplies no fewer than 17
_POINTER = ctypes.c_void_p


class RoundArgs(ctypes.Structure):
    _fields_ = [("x", _POINTER), ("out", OutArgs)]


class Round(LeavesRows):
    """Rows as 8-bit integers."""

    source = SOURCE

    def __init__(self, x: Buffer, rounded: Rounded) -> None:
        super().__init__()
        if x.width % VECTOR or x.width > MAX_WIDTH:
            raise NotFused(f"rows of {x.width} as integers: multiples of 8 up to {MAX_WIDTH}")
        self.x, self.y = x, Buffer(x.width, plain=False, rounded=rounded)
        self.reads, self.writes = [x], self.left
        self.arguments, self.vector = RoundArgs(), VECTOR
        self.threads = min(1024, -(-x.width // (64 * VECTOR)) * 32)  # two loads each

    @property
    def body(self) -> str:
        return f"round_rows<{self.x.width}, {VECTOR}, {self.threads}, {self.store}>"

    def __call__(self, size: Size) -> None:
        if not self.on_gpu:
            self._leave(self.x.tensor[: size.tokens].float())
            return
        self.arguments.x = self.x.tensor.data_ptr()
        self._point(self.arguments.out)
        self.launch(size.tokens)


class FinishArgs(ctypes.Structure):
    _fields_ = [
        *(("sums", _POINTER * 2), ("row_steps", _POINTER), ("column_steps", _POINTER * 2)),
        *(("bias", _POINTER * 2), ("y", _POINTER), ("factor", ctypes.c_float)),
        *(("row_step", ctypes.c_int), ("count", ctypes.c_longlong)),
    ]


def are_integers(product: Product, gate: Product | None) -> bool:
    """Whether one launch multiplies integers and activates: with a gate, of the same rows."""
    together = gate is None or (gate.steps is not None and gate.x is product.x)
    return product.steps is not None and together


def integer_product(
    product: Product,
    dtype: torch.dtype,
    gate: Product | None = None,
    leaves: Rounded | None = None,
) -> "IntegerProduct | Int8Product":
    """What computes it (see ``IntegerProduct``): a kernel of our own where it runs."""
    try:
        check(product.matrix.device, dtype, *product.matrix.shape)
    except NotFused:
        return IntegerProduct(product, gate, leaves)
    assert isinstance(product.x, Rounded)
    x, width = product.x, product.matrix.shape[1]

    def weight(of: Product) -> Int8Weight:
        assert of.steps is not None
        return Int8Weight(of.matrix.T, of.steps.flatten(), of.bias)

    return Int8Product(
        x.values,
        x.steps if x.step is None else x.steps.tensor.flatten(),
        weight(product),
        product.onto or (Buffer(width) if leaves is None else leaves.values),
        product.activation,
        None if gate is None else weight(gate),
        onto=product.onto is not None,
        step=None if leaves is None else leaves.step,
    )


class IntegerProduct(Kernel):
    """A product of rows that are integers, activated and times a second one if there are such."""

    source = SOURCE

    def __init__(
        self, product: Product, gate: Product | None = None, leaves: Rounded | None = None
    ) -> None:
        """
        Args:
            product: what it computes, with an activation by a name of common.cu's.
            gate: of the same rows.
            leaves: takes its results as integers of a step that is known; else they are rows, or
                are added to ``product.onto``.
        """
        super().__init__()
        assert isinstance(product.x, Rounded)
        self.x, self.factors = product.x, [product] if gate is None else [product, gate]
        self.leaves, width = leaves, product.matrix.shape[1]
        self._sums = [Buffer(width, dtype=torch.int32) for _ in self.factors]
        self.y = product.onto or (Buffer(width) if leaves is None else leaves.values)
        self.reads: Sequence[Buffer] = [self.x.values] + [self.x.steps] * (self.x.step is None)
        self.writes = [self.y, *self._sums]
        self.arguments = FinishArgs(row_step=int(self.x.step is None))
        if leaves is not None:
            assert leaves.step is not None
            self.arguments.factor = 1 / leaves.step
        for i, factor in enumerate(self.factors):
            assert factor.steps is not None
            self.arguments.column_steps[i] = factor.steps.data_ptr()
            self.arguments.bias[i] = pointer(factor.bias)

    @property
    def body(self) -> str:
        product = self.factors[0]
        left = "ONTO_STREAM" if product.onto is not None else "ROWS_OF_T"
        left = left if self.leaves is None else "INTEGERS"
        gated = str(len(self.factors) > 1).lower()
        return f"finish<{self.y.width}, {product.activation or 'NOT_ACTIVATED'}, {gated}, {left}>"

    def __call__(self, size: Size) -> None:
        if not self.on_gpu:
            self.reference(size)
            return
        args, x = self.arguments, self.x.values.rows(max(size.tokens, LEAST_ROWS))
        for i, (factor, sums) in enumerate(zip(self.factors, self._sums, strict=True)):
            torch._int_mm(x, factor.matrix, out=sums.rows(len(x)))
            args.sums[i] = sums.tensor.data_ptr()
        args.row_steps, args.y = self.x.steps.tensor.data_ptr(), self.y.tensor.data_ptr()
        args.count = size.tokens * self.y.width
        self.launch(-(-args.count // (self.threads * VECTOR)))

    def reference(self, size: Size) -> None:
        x, rows = self.x.values.tensor[: size.tokens].double(), slice(size.tokens)
        row_steps = self.x.steps.tensor[rows if self.x.step is None else slice(1)]
        found = []
        for factor in self.factors:
            assert factor.steps is not None
            y = (x @ factor.matrix.double()).float() * (row_steps * factor.steps.T)
            y = y if factor.bias is None else y + factor.bias.float()
            found.append(y if factor.activation is None else ACTIVATIONS[factor.activation](y))
        result = found[0] if len(found) == 1 else found[0] * found[1]
        if self.leaves is not None:
            self.leaves.fill(result)
        elif self.factors[0].onto is not None:
            self.y.tensor[rows] += result
        else:
            self.y.tensor[rows] = result.to(self.y.tensor.dtype)
