"""Products of 8-bit integers over packed rows, for the tensor cores of Hopper: int8.cu."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from fastgen.engines import NotFused, nvrtc
from fastgen.engines.fused.packed_kernels import ACTIVATIONS, Kernel, pointer
from fastgen.engines.fused.packed_values import LARGEST, Buffer, Size

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_MAP = ctypes.c_uint64 * 16
ROWS, INPUTS = 128, 128  # of a tile
_SHARED = 200 * 1024  # bytes of a block's tiles


@dataclass(frozen=True)
class Int8Weight:
    """A weight in 8 bits with what its products are multiplied by, and what is added then."""

    values: torch.Tensor
    """int8 [N, K]"""
    scale: torch.Tensor
    """float32 [N]"""
    bias: torch.Tensor | None = None
    """[N] in the dtype of activations"""


@dataclass(frozen=True)
class Tile:
    """What a block computes at a time: 128 rows of x by columns of weights; and what that takes."""

    columns: int
    turns: bool
    """Whether the two warp groups have a tile each, and one multiplies while the other stores."""
    step: float
    """Microseconds for 128 columns of x, on an H100; these are what tiles are chosen by."""
    each: float
    """Microseconds of a tile beside these."""
    once: float = 0.0
    """Microseconds of the last tile that no other hides."""

    @property
    def stages(self) -> int:
        """Tiles of x and of weights that a block holds."""
        return _SHARED // ((ROWS + self.columns) * INPUTS)

    @property
    def shared_bytes(self) -> int:
        stage = (ROWS + self.columns) * INPUTS + 16  # with its two barriers
        return self.stages * stage + 4 * self.columns * 8 + 1024  # scales; for its first address

    def count(self, rows: int, outputs: int, gated: bool) -> int:
        columns = self.columns // 2 if gated else self.columns
        return -(-rows // ROWS) * -(-outputs // columns)

    def __str__(self) -> str:
        return f"{self.columns}{' in turns' * self.turns}"


TILES = (
    Tile(64, False, 0.27, 1.0),
    Tile(128, False, 0.36, 1.7),
    Tile(128, True, 0.38, 0.5, 1.2),
    Tile(256, False, 0.69, 2.5),
)


class Int8Args(ctypes.Structure):
    _fields_ = [
        *(("x", _MAP), ("weight", _MAP * 2), ("row_scale", _POINTER)),
        *(("column_scale", _POINTER * 2), ("bias", _POINTER * 2), ("y", _POINTER)),
        *(("count", _POINTER), ("rows", _INT), ("columns", _INT), ("inputs", _INT)),
        *(("row_step", _INT), ("factor", ctypes.c_float)),
        ("padding", ctypes.c_char * 52),  # to a multiple of 64 bytes
    ]


def check(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    """
    Raises:
        NotFused: this GPU, activations of this dtype or a weight of this size are not served.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        raise NotFused("8-bit products of many rows need compute capability 9.0")
    if dtype not in (torch.float16, torch.bfloat16):
        raise NotFused(f"8-bit products in {dtype}: float16 or bfloat16")
    if inputs % 16 or outputs % 8:
        raise NotFused(f"8-bit products of {inputs} to {outputs} columns: multiples of 16 and 8")


class Int8Product:
    """``activation(sums * row_scale * weight.scale + weight.bias)``, where the sums are those of
    ``x @ weight.values.T``, exact; with a gate times the same of a second weight."""

    def __init__(
        self,
        x: Buffer,
        row_scale: Buffer | torch.Tensor,
        weight: Int8Weight,
        y: Buffer,
        activation: str | None = None,
        gate: Int8Weight | None = None,
        onto: bool = False,
        step: float | None = None,
    ) -> None:
        """
        Args:
            x: int8 [T, K].
            row_scale: float32, one a row, or a tensor of one for all.
            y: takes the results.
            activation: one of the kernels': RELU, GELU_TANH, GELU_ERF or SILU.
            gate: of the weight's size.
            onto: whether ``y`` is a residual stream in float32, which they are added to.
            step: ``y`` is int8 of this step; None: rows of the dtype of activations.
        """
        self.x, self.row_scale, self.weight, self.y = x, row_scale, weight, y
        self.activation, self.gate, self.onto, self.step = activation, gate, onto, step
        scales = [row_scale] if isinstance(row_scale, Buffer) else []
        self.reads: Sequence[Buffer] = [x, *scales, *([y] if onto else [])]
        self.writes: Sequence[Buffer] = [y]
        self.kernels = {tile: TiledProduct(self, tile) for tile in TILES}

    def __call__(self, size: Size) -> None:
        device = self.weight.values.device
        if device.type != "cuda":
            self.reference(size)
            return
        outputs, inputs = self.weight.values.shape
        processors, gated = _processors(device), self.gate is not None
        tile = best_tile(size.tokens, inputs, outputs, gated, processors)
        self.kernels[tile](size, processors)

    def reference(self, size: Size) -> None:
        x, scale = self.x.rows(size.tokens).double(), self.row_scale
        rows = scale.rows(size.tokens) if isinstance(scale, Buffer) else scale

        def product(weight: Int8Weight) -> torch.Tensor:
            sums = (x @ weight.values.double().T).float() * rows.reshape(-1, 1) * weight.scale
            return sums if weight.bias is None else sums + weight.bias.float()

        result = product(self.weight)
        if self.activation is not None:
            result = ACTIVATIONS[self.activation](result)
        if self.gate is not None:
            result = result * product(self.gate)
        if self.step is not None:
            result = (result / self.step).round().clamp(-LARGEST, LARGEST)
        y = self.y.rows(size.tokens)
        y.copy_(y + result if self.onto else result)


class TiledProduct(Kernel):
    """A product in tiles of one size."""

    source, threads, alone = "int8.cu", 384, True

    def __init__(self, product: Int8Product, tile: Tile) -> None:
        super().__init__()
        self._product, self._tile = product, tile
        self.shared_bytes = tile.shared_bytes
        weights = [w for w in (product.weight, product.gate) if w is not None]
        outputs, inputs = product.weight.values.shape
        self.arguments = args = Int8Args(columns=outputs, inputs=inputs)
        args.factor = 0.0 if product.step is None else 1 / product.step
        for i, weight in enumerate(weights):
            args.column_scale[i], args.bias[i] = weight.scale.data_ptr(), pointer(weight.bias)
        self._weights, self._mapped = weights, 0

    @property
    def body(self) -> str:
        tile, product = self._tile, self._product
        flags = f"{product.activation or 'STORED'}, {_word(product.gate)}, {_word(product.onto)}"
        flags += f", {_word(product.step)}"
        return f"int8_product<{tile.columns}, {_word(tile.turns)}, {flags}>"

    def __call__(self, size: Size, processors: int) -> None:
        args, product, tile = self.arguments, self._product, self._tile
        x, scale = product.x.tensor, product.row_scale
        if self._mapped != x.data_ptr():
            for i, weight in enumerate(self._weights):
                _fill(args.weight[i], nvrtc.tensor_map(weight.values, tile.columns // 2))
            _fill(args.x, nvrtc.tensor_map(x, ROWS))
            self._mapped = x.data_ptr()
        rows = scale.tensor if isinstance(scale, Buffer) else scale
        args.row_scale, args.row_step = rows.data_ptr(), int(isinstance(scale, Buffer))
        args.y, args.rows = product.y.tensor.data_ptr(), size.tokens
        args.count = None if size.even else size.starts[-1:].data_ptr()
        tiles = tile.count(size.tokens, args.columns, product.gate is not None)
        self.launch(min(tiles, processors))


def _fill(field: ctypes.Array[ctypes.c_uint64], tensor_map: bytes) -> None:
    ctypes.memmove(field, tensor_map, 128)


def _word(flag: object) -> str:
    return str(flag is not None and flag is not False).lower()


def best_tile(rows: int, inputs: int, outputs: int, gated: bool, processors: int) -> Tile:
    """The tile by which all processors are done first."""

    def time(tile: Tile) -> float:
        rounds = -(-tile.count(rows, outputs, gated) // processors)
        return rounds * (-(-inputs // INPUTS) * tile.step + tile.each) + tile.once

    return min(TILES, key=time)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
