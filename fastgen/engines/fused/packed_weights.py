"""Weights of fewer bits in products of packed rows: in front of them they become matrices, in
scratch, for cuBLAS."""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from fastgen import cuda
from fastgen.blockwise import Blocks, Format, dequantise
from fastgen.engines import NotFused
from fastgen.engines.fused.packed_kernels import Kernel
from fastgen.engines.fused.packed_products import Product, Products, Recorded
from fastgen.engines.fused.packed_values import THREADS, VECTOR, Buffer, Size
from fastgen.engines.fused.values import Matrix
from fastgen.target import Target

KINDS = "int4", "fp8"
"""Weights that are served so; int8 has products of its own (packed_integers.py)."""
AT_ONCE = 2**23
"""Numbers of one launch, of small matrices: as many as the L2 cache holds beside those of the
launch before it, whose products still read them."""
PIECE = 2**24
"""Numbers of one launch, of some outputs of a larger matrix: as many as the L2 cache holds."""
_OUTPUTS = 256  # of a piece, a multiple of this: the tiles of cuBLAS's products
_MATRICES, _EACH = 8, 4  # of a launch; loads of a thread
_GROUP = 64  # inputs of which a scale must be a multiple: see weights.cu
_HALVES = 2  # products read one while the other is written
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
    """Makes matrices of weights of fewer bits; where there is a stream for that, those of the next
    such launch, while the products behind this one run."""

    behind, source = ("weights.cu",), "encoder_weights.cu"
    overlaps = False
    reads: Sequence[Buffer] = ()
    writes: Sequence[Buffer] = ()

    def __init__(self) -> None:
        super().__init__()
        self.arguments = DequantiseMatricesArgs()
        self.following: Dequantise | None = None
        self.made: list[tuple[Matrix, torch.Tensor]] = []
        self._element = ""
        self._ready: torch.cuda.Event | None = None

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
        if size.fetching is None:
            self._run()
            return
        if self._ready is None:
            self._run()
        else:
            self._ready.wait()
        if self.following is not None:
            self.following.ahead(size.fetching)

    def ahead(self, stream: cuda.Side) -> None:
        """Run on a stream beside the current one, behind what that has been given so far."""
        stream.wait_stream(torch.cuda.current_stream())
        self._ready = torch.cuda.Event()
        with torch.cuda.stream(stream):
            self._run()
            self._ready.record()

    def _run(self) -> None:
        if self.on_gpu:
            self.launch(-(-self.numbers // (VECTOR * _EACH * THREADS)))
            return
        for matrix, y in self.made:
            assert matrix.blocks is not None
            y.copy_(dequantise(matrix.blocks, (y.shape[0], y.shape[1]), y.dtype))


class Scratch:
    """Memory for matrices, in two halves, which all bindings of an engine share."""

    def __init__(self, dtype: torch.dtype) -> None:
        """At first it is on no device: an engine records its launches once to learn their sizes."""
        self._halves = [torch.empty(0, dtype=dtype, device="meta") for _ in range(_HALVES)]

    def on(self, device: torch.device) -> "Scratch":
        """Itself, with memory of as many numbers as somebody asked for so far."""
        if self._halves[0].device.type != device.type:
            self._halves = [torch.empty_like(half, device=device) for half in self._halves]
        return self

    def part(self, half: int, start: int, shape: Sequence[int]) -> torch.Tensor:
        """Numbers of that shape; what others have of the half stays as it is."""
        stop = start + prod(shape)
        if len(self._halves[half]) < stop:
            self._halves[half] = self._halves[half].new_empty(stop)
        return self._halves[half][start:stop].view(shape)


class InPieces:
    """A product by a large matrix: some outputs after the other, as soon as they are made."""

    def __init__(self, product: Product, pieces: Sequence[tuple[Dequantise, Product]]) -> None:
        self.reads = [product.x] if isinstance(product.x, Buffer) else []
        self.writes = [product.onto or Buffer(product.matrix.shape[1])]
        self.launches: list[Recorded] = []
        for made, piece in pieces:
            multiplied = Products([piece])
            multiplied.writes = self.writes
            self.launches += made, multiplied

    def __call__(self, size: Size) -> None:
        for launch in self.launches:
            launch(size)


class Placing:
    """Gives the products of one recording their matrices, and launches that make them."""

    def __init__(self, scratch: Scratch, record: Callable[[Dequantise], object]) -> None:
        self._scratch, self._record = scratch, record
        self._last: Dequantise | None = None
        self._half = 0

    def launches(self, products: Sequence[Product]) -> Iterator[Recorded]:
        """Products that do not depend on each other, as they are to be recorded: by large matrices
        one after the other."""
        if any(prod(matrix.sizes) > AT_ONCE for matrix in _narrow(products)):
            for product in products:
                yield self._in_pieces(product, product.made_of)
        else:
            yield Products(self.placed(products))

    def _in_pieces(self, product: Product, matrix: Matrix | None) -> InPieces | Products:
        if matrix is None:
            return Products([product])
        inputs, outputs = matrix.sizes
        each = -(-outputs // -(-inputs * outputs // PIECE))
        # an activation of cuBLAS's is of results that lie side by side
        each = -(-each // _OUTPUTS) * _OUTPUTS if product.activation is None else outputs
        if self._last is not None:  # whose products may still read theirs
            self._last, self._half = None, (self._half + 1) % _HALVES
        return InPieces(product, [self._piece(product, i, each) for i in range(0, outputs, each)])

    def _piece(self, product: Product, start: int, count: int) -> tuple[Dequantise, Product]:
        """A product of some outputs, and what makes its matrix."""
        whole, some, launch = product.made_of, slice(start, start + count), Dequantise()
        assert whole is not None and whole.blocks is not None
        values, scales = whole.values[some], whole.blocks.scales[some]
        blocks = Blocks(values, scales, whole.blocks.kind)
        part = Matrix(values, (whole.sizes[0], len(values)), blocks=blocks)
        bias = None if product.bias is None else product.bias[some]
        piece = replace(product, made_of=part, bias=bias, columns=some)
        return launch, self._of_scratch(launch, piece)

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
            launch = Dequantise()
            if self._last is not None:
                self._last.following = launch
            self._last, self._half = launch, (self._half + 1) % _HALVES
            self._record(launch)
        return [self._of_scratch(self._last, product) for product in products]

    def _of_scratch(self, launch: Dequantise, product: Product) -> Product:
        if (matrix := product.made_of) is None:
            return product
        y = self._scratch.part(self._half, launch.numbers, matrix.sizes[::-1])
        launch.make(matrix, y)
        return replace(product, matrix=y.T)


def _narrow(products: Sequence[Product]) -> list[Matrix]:
    return [product.made_of for product in products if product.made_of is not None]
