"""Weights of fewer bits in products of packed rows: in front of them they become matrices, in
scratch, for cuBLAS."""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from fastgen.blockwise import Blocks, Format, dequantise
from fastgen.engines import NotFused
from fastgen.engines.fused.packed_kernels import Kernel
from fastgen.engines.fused.packed_products import Product
from fastgen.engines.fused.packed_values import THREADS, VECTOR, Buffer, Size
from fastgen.engines.fused.values import Matrix
from fastgen.target import Target

KINDS = "int4", "fp8"
"""Weights that are served so; int8 has products of its own (packed_integers.py)."""
AT_ONCE = 2**23
"""Numbers of one launch, of small matrices: as many as the L2 cache holds beside what else runs."""
_MATRICES, _EACH = 8, 4  # of a launch; loads of a thread
_GROUP = 64  # inputs of which a scale must be a multiple: see weights.cu
_POINTER = ctypes.c_void_p


def narrow_matrix(
    parameters: Mapping[str, torch.Tensor], name: str, target: Target, transposed: bool
) -> Matrix:
    """What a product reads in place of a parameter.

    Args:
        parameters: by name, and what is made of them by the names of ``blockwise.Format``.
        transposed: whether the parameter is [in, out].

    Raises:
        NotFused: its size is not served.
    """
    kind, group = target.weights, target.group
    assert kind != "full"
    outputs, inputs = parameters[name].shape[:: -1 if transposed else 1]
    if inputs % VECTOR or group % _GROUP:
        raise NotFused(
            f"{kind} of {name}, {inputs} inputs in groups of {group}: packed encoders serve "
            f"multiples of {VECTOR}, groups of multiples of {_GROUP}"
        )
    values, scales = (parameters[n] for n in Format(kind, group, transposed).names(name))
    return Matrix(values, (inputs, outputs), blocks=Blocks(values, scales, kind))


class DequantiseMatricesArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER * _MATRICES) for name in ("values", "scales", "y")),
        ("inputs", ctypes.c_int * _MATRICES),
        ("ends", ctypes.c_uint * _MATRICES),
        ("count", ctypes.c_int),
    ]


class Dequantise(Kernel):
    """Makes matrices of weights of fewer bits, in front of the products that read them."""

    behind, source = ("weights.cu",), "encoder_weights.cu"
    reads: Sequence[Buffer] = ()
    writes: Sequence[Buffer] = ()

    def __init__(self) -> None:
        super().__init__()
        self.arguments = DequantiseMatricesArgs()
        self.made: list[tuple[Matrix, torch.Tensor]] = []
        self._element = ""

    @property
    def body(self) -> str:
        return f"dequantise_matrices<{self._element}, {self.threads}, {_EACH}>"

    @property
    def numbers(self) -> int:
        return sum(prod(matrix.sizes) for matrix, _ in self.made)

    def takes(self, matrices: Sequence[Matrix]) -> bool:
        """Whether it may make these, too."""
        more = sum(prod(matrix.sizes) for matrix in matrices)
        alike = self._element == matrices[0].element
        fits = self.numbers + more <= AT_ONCE
        return alike and fits and len(self.made) + len(matrices) <= _MATRICES

    def make(self, matrix: Matrix, y: torch.Tensor) -> None:
        """Make one more, as numbers [out, in]."""
        assert matrix.blocks is not None
        args, i = self.arguments, len(self.made)
        self.made.append((matrix, y))
        self._element = matrix.element
        args.values[i], args.scales[i] = matrix.values.data_ptr(), matrix.blocks.scales.data_ptr()
        args.y[i], args.inputs[i] = y.data_ptr(), matrix.sizes[0]
        args.ends[i], args.count = self.numbers // VECTOR, i + 1

    def __call__(self, size: Size) -> None:
        if self.on_gpu:
            self.launch(-(-self.numbers // (VECTOR * _EACH * THREADS)))
            return
        for matrix, y in self.made:
            assert matrix.blocks is not None
            y.copy_(dequantise(matrix.blocks, (y.shape[0], y.shape[1]), y.dtype))


class Scratch:
    """Memory for matrices, which all bindings of an engine share."""

    def __init__(self, dtype: torch.dtype) -> None:
        """At first it is on no device: an engine records its launches once to learn their sizes."""
        self.numbers = torch.empty(0, dtype=dtype, device="meta")

    def on(self, device: torch.device) -> None:
        """Have memory of as many numbers as somebody asked for so far."""
        if self.numbers.device.type != device.type:
            self.numbers = torch.empty_like(self.numbers, device=device)

    def part(self, start: int, shape: Sequence[int]) -> torch.Tensor:
        """Numbers of that shape."""
        stop = start + prod(shape)
        if len(self.numbers) < stop:
            self.numbers = self.numbers.new_empty(stop)
        return self.numbers[start:stop].view(shape)


class Placing:
    """Gives the products of one recording their matrices, and launches that make them."""

    def __init__(self, scratch: Scratch, record: Callable[[Dequantise], object]) -> None:
        self._scratch, self._record = scratch, record
        self._last: Dequantise | None = None

    def in_turn(self, products: Sequence[Product]) -> Iterator[Sequence[Product]]:
        """Products that do not depend on each other, ``placed``, as they are to be recorded: by
        large matrices one after the other, each in the same memory."""
        large = any(prod(matrix.sizes) > AT_ONCE for matrix in _narrow(products))
        for some in [[product] for product in products] if large else [products]:
            yield self.placed(some)

    def placed(self, products: Sequence[Product]) -> Sequence[Product]:
        """The same, of matrices whose numbers are there when these run.

        Raises:
            NotFused: they are of different kinds.
        """
        if not (matrices := _narrow(products)):
            return products
        if len(kinds := {matrix.element for matrix in matrices}) > 1:
            raise NotFused(f"products side by side of {' and '.join(sorted(kinds))}")
        if self._last is None or not self._last.takes(matrices):
            self._last = Dequantise()
            self._record(self._last)
        return [self._of_scratch(self._last, product) for product in products]

    def _of_scratch(self, launch: Dequantise, product: Product) -> Product:
        if (matrix := product.made_of) is None:
            return product
        y = self._scratch.part(launch.numbers, matrix.sizes[::-1])
        launch.make(matrix, y)
        return replace(product, matrix=y.T)


def _narrow(products: Sequence[Product]) -> list[Matrix]:
    return [product.made_of for product in products if product.made_of is not None]
