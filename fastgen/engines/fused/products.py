"""Products, and the norms in front of them, as launches for few rows (see linear.cu)."""

from typing import Any

import torch

from fastgen.engines import NotFused
from fastgen.engines.fused.recorder import REGISTERS, Recorder
from fastgen.engines.fused.values import (
    LinearArgs,
    Matrix,
    Normed,
    Product,
    Residual,
    pointer,
)

TILE_ROWS = 16  # one side of a tensor core product
MAX_WIDTH = 8192  # of a norm
_FUSED_NORM_ROWS = 4  # of more rows, the norm is a launch of its own
_FUSED_LAYER_NORM_ROWS = 1  # the same, with a mean to subtract
STATIC_SHARED = 48 * 1024  # bytes a block may have without asking
ACTIVATIONS = {
    "relu": "RELU",
    "gelu_new": "GELU_TANH",
    "gelu_pytorch_tanh": "GELU_TANH",
    "gelu": "GELU_ERF",
    "silu": "SILU",
    "swish": "SILU",
}


class Products(Recorder):
    """Records products; lazy norms become part of them, or launches of their own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._additions: dict[int, int] = {}  # to each residual stream, by its tensor's id

    def _linear(
        self, y: torch.Tensor, products: list[Product], epilogue: str, activation: str = "relu"
    ) -> None:
        """Launch products that share their input; ``y`` takes their outputs side by side."""
        self._check_products(products, epilogue)
        product = products[0]
        x, weight, (inputs, outputs) = product.x, product.weight, products[-1].sizes
        args = LinearArgs(y=y.data_ptr(), scale=product.scale)
        args.weight[: len(products)] = [product.weight.values.data_ptr() for product in products]
        args.scales[: len(products)] = [pointer(product.weight.scales) for product in products]
        args.zeros[: len(products)] = [pointer(product.weight.zeros) for product in products]
        args.bias[: len(products)] = [pointer(product.bias) for product in products]
        gated = epilogue == "GATE"
        first = product.sizes[1] // outputs  # as many segments are of the first product
        segments, weights = (1, 2) if gated else (len(products) - 1 + first, 1)
        few = self._rows <= _FUSED_NORM_ROWS
        leaves_room = weight.plain and (few or not weight.across)
        warps = self._warps(inputs)
        if weight.blocks is not None:
            warps = self._narrow_warps(inputs, isinstance(x, Normed))
        elif leaves_room and not isinstance(x, Normed):
            warps = min(warps, 16)  # half a processor's threads, see _blocks_beside
        tiles = self._tiles(outputs * segments, warps, weights, weight)
        blocks, norm = -(-outputs // (8 * tiles)) * segments, "NONE"
        shared = self._shared(weight, warps, tiles * weights)
        if isinstance(x, Normed) and not self._norms_inside(x, weight, warps, shared):
            x = self._norm(x, inputs)
        if shared > STATIC_SHARED:
            raise NotFused(f"{inputs} inputs by {self._rows} rows: more than shared memory holds")
        if isinstance(x, Normed):
            norm = self._begin_norm(x, args)
        else:
            args.x = x.data_ptr()
        sizes = f"{inputs}, {outputs}, {segments}, {tiles}, {warps}"
        biased = any(product.bias is not None for product in products)
        flags = f"{str(biased).lower()}, {str(weight.across).lower()}"
        flags += f", {first}" if first > 1 else ""
        kind = f"{norm}, {epilogue}, {ACTIVATIONS[activation]}, {flags}"
        body = f"linear<{weight.element}, {sizes}, {kind}>"
        together = None
        if weight.blocks is not None:  # 80 registers a thread, and no wave of one block alone
            together = max(24 // warps, min(-(-blocks // self._processors), 2))
        elif leaves_room and norm != "LAYER":  # whose threads need more registers
            together = self._blocks_beside(blocks, 32 * warps)
        self._launch(body, (blocks, 1), 32 * warps, args, together)

    def _shared(self, weight: Matrix, warps: int, tiles: int) -> int:
        """Bytes that a block holds of its tiles: sums of every warp, scales of every group."""
        held = 4 * warps * 8 * tiles * self._rows
        if weight.blocks is not None and weight.group:
            affine = 1 if weight.zeros is None else 2  # numbers of a group
            held += affine * weight.blocks.scales[0].nbytes * (8 * tiles + 2)
        return held

    def _check_products(self, products: list[Product], epilogue: str) -> None:
        inputs, outputs = products[-1].sizes  # the first may have several times the outputs
        first = products[0].sizes[1] // outputs
        kinds = {(p.weight.element, p.weight.across, p.scale) for p in products}
        sizes = {p.sizes for p in products[1:]} | {(inputs, outputs)}
        alike = len(kinds) == len(sizes) == 1 and products[0].sizes == (inputs, first * outputs)
        if not alike or (first > 1 and (epilogue != "STORE" or products[0].weight.across)):
            raise NotFused("products of one input that differ in shape, dtype or scale")
        if epilogue == "GATE" and products[0].weight.across:
            raise NotFused("gated products of [in, out] weights")

    def _warps(self, inputs: int) -> int:
        """Warps that share out a row of weights: four loads each, if a block holds so many."""
        return min(max(-(-inputs // 128), 8), 32)

    def _blocks_beside(self, blocks: int, threads: int) -> int | None:
        """Blocks that a processor should have room for: twice its share of them, so that those of
        the next launch fit beside them and fetch their weights meanwhile. None: the next one's
        fit anyway, or never would."""
        wanted = 2 * -(-blocks // self._processors)
        fits = wanted * threads * 64 <= REGISTERS
        return wanted if fits and wanted * threads >= 1024 else None

    def _narrow_warps(self, inputs: int, normed: bool) -> int:
        """The same of weights of fewer bits. Half a processor's threads at most: the next launch's
        blocks find room beside them, and fetch their weights meanwhile."""
        return min(max(-(-inputs // (128 if normed else 256)), 8), 16)

    def _tiles(self, outputs: int, warps: int, weights: int, weight: Matrix) -> int:
        """Tiles of eight outputs that one block computes. Several read the input less often, which
        counts with many rows, and weights that lie across in longer pieces; few leave processors
        without work. The bounds are measured ones."""
        if weight.across:
            sums = 4 * warps * 8 * self._rows  # bytes of a tile: floats of every warp
            many = outputs // 8 >= 3 * self._processors and sums <= 2**13
            return 4 if many else 2
        few = self._rows == 1 or (self._rows <= _FUSED_NORM_ROWS and weight.blocks is None)
        least = self._processors // (1 if few else 2)
        most = 8 if weight.blocks is not None and warps <= 8 else 4  # beside 80 registers a thread
        for tiles in (8, 4, 2):
            outputs_held = 8 * tiles * self._rows  # one a thread, and float sums of every warp
            fits = outputs_held <= 32 * warps and 4 * warps * weights * outputs_held <= 2**14
            if fits and tiles * weights <= most and outputs // (8 * tiles) >= least:
                return tiles
        return 1

    # Norms

    def _norms_inside(self, x: Normed, weight: Matrix, warps: int, shared: int) -> bool:
        """Whether a product's blocks norm their input themselves: few rows, which fit them beside
        what they hold."""
        width, widest = weight.sizes[0], (128 if weight.blocks is None else 256) * warps
        own = self._rows * ((width + 32) * self._dtype.itemsize + 8 * warps)
        fits = width <= widest and own + shared <= STATIC_SHARED
        most = _FUSED_NORM_ROWS if x.bias is None else _FUSED_LAYER_NORM_ROWS
        return fits and self._rows <= most

    def _norm(self, x: Normed, width: int) -> torch.Tensor:
        """Launch a norm; gives its rows."""
        if width > MAX_WIDTH:
            raise NotFused(f"a norm of width {width}: fused kernels serve {MAX_WIDTH}")
        y = self._buffer("normed", width)
        args = LinearArgs(y=y.data_ptr())
        warps = self._warps(width)
        body = f"norm<{self._begin_norm(x, args)}, {width}, {warps}>"
        self._launch(body, (self._rows, 1), 32 * warps, args)
        return y

    def _begin_norm(self, x: Normed, args: LinearArgs) -> str:
        """Let a launch norm its input; gives the norm's kind."""
        self._check_current(x.residual)
        args.x = x.residual.tensor.data_ptr()
        args.norm.weight, args.norm.bias = pointer(x.weight), pointer(x.bias)
        args.norm.eps = x.eps
        x.launched.append(args)
        return "RMS" if x.bias is None else "LAYER"

    def _check_current(self, residual: Residual) -> None:
        if residual.additions != self._additions.get(id(residual.tensor), 0):
            raise NotFused("a residual stream that has moved on")

    def _stream(self, width: int, other: torch.Tensor | None = None) -> Residual:
        """A residual stream to write anew: of two that take turns the one that is not ``other``."""
        tensor = self._buffer("residual", width, torch.float32)
        if other is tensor:
            tensor = self._buffer("residual, in turn", width, torch.float32)
        additions = self._additions[id(tensor)] = self._additions.get(id(tensor), 0) + 1
        return Residual(tensor, additions)

    def _as_stream(self, x: Normed) -> Residual:
        """What was normed as the next residual stream: whoever computes it first stores it."""
        if x.bias is None:
            raise NotFused("a root-mean-square norm that is the next residual stream")
        stream = self._stream(x.residual.tensor.shape[1], x.residual.tensor)
        if not x.launched:
            self._norm(x, x.residual.tensor.shape[1])
        x.launched[0].norm.stream = stream.tensor.data_ptr()
        return stream

    def _add(self, residual: Residual, x: Product) -> Residual:
        """Launch a product that is added to a residual stream."""
        self._check_current(residual)
        self._linear(residual.tensor, [x], "ADD")
        additions = self._additions[id(residual.tensor)] = residual.additions + 1
        return Residual(residual.tensor, additions)
