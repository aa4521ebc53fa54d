"""The vocabulary of ``ops/`` as launches of fused CUDA kernels: about eight a layer.

Family code runs through ``FusedOps`` unchanged, over torch tensors. It is lazy: norms, products and
activations stay descriptions until something needs their numbers, and then become one launch with
all that can be part of it.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

import torch

from fastgen.engines import NotFused
from fastgen.engines.fused.values import (
    Activated,
    AttentionArgs,
    EmbeddingArgs,
    LinearArgs,
    Normed,
    Product,
    Residual,
)
from fastgen.engines.nvrtc import Launch
from fastgen.ops.values import Bias, KVSlots
from fastgen.target import Target

TILE_ROWS = 16  # one side of a tensor core product
HEAD_SIZES = (16, 32, 64, 128)
MAX_SLOTS = 8192  # a block keeps the bias of its slots in shared memory
_FUSED_NORM_ROWS = 4  # of more rows, the norm is a launch of its own
_STATIC_SHARED = 48 * 1024  # bytes a block may have without asking
_SOURCES = ("linear.cu", "attention.cu")
_ELEMENTS = {torch.float32: "float", torch.float16: "fp16", torch.bfloat16: "bf16"}
ACTIVATIONS = {
    "relu": "RELU",
    "gelu_new": "GELU_TANH",
    "gelu_pytorch_tanh": "GELU_TANH",
    "gelu": "GELU_ERF",
    "silu": "SILU",
    "swish": "SILU",
}


class _Builder:
    """What onnxscript's modules tell which of them is at work; nothing here depends on it."""

    def push_module(self, name: str, class_name: str) -> None: ...

    def pop_module(self) -> None: ...


class FusedOps:
    """Records the launches of one step; the methods are those of ``ops.standard.Ops``."""

    def __init__(
        self,
        target: Target,
        parameters: Mapping[str, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        self.builder = _Builder()
        self.target = target
        self.device = tensors["input_ids"].device
        self.launches: list[Launch | Callable[[int], None]] = []
        """In their order; a function queues work on torch's current stream, given its handle."""
        self._parameters = parameters
        self._tensors = dict(tensors)  # launches hold only pointers to them
        self._dtype = getattr(torch, target.dtype)
        self._batch, self._queries = tensors["input_ids"].shape
        self._rows = self._batch * self._queries
        self._names: dict[str, str] = {}  # of kernels, by instantiation
        self._kernels: list[str] = []
        self._scratch: dict[tuple[str, int], torch.Tensor] = {}
        self._additions = 0
        self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count

    @property
    def _tile_rows(self) -> int:
        """Rows of the products that kernels compute."""
        return self._rows

    def __getattr__(self, name: str) -> Any:
        raise NotFused(f"operation {name!r}")

    def source(self) -> str:
        """CUDA source of every kernel that the recorded launches name."""
        head = {"T": _ELEMENTS[self._dtype], "ROWS": self._tile_rows, "QUERIES": self._queries}
        lines = [f"#define {name} {value}" for name, value in head.items()]
        lines += [files("fastgen.engines.fused").joinpath(name).read_text() for name in _SOURCES]
        return "\n".join([*lines, *self._kernels])

    # Launches

    def _launch(
        self, body: str, grid: tuple[int, int], threads: int, args: ctypes.Structure, **more: int
    ) -> None:
        """Launch an instantiation of a kernel template."""
        if body not in self._names:
            name = self._names[body] = f"{body.split('<')[0]}_{len(self._names)}"
            self._kernels.append(
                f'extern "C" __global__ void __launch_bounds__({threads}) {name}'
                f"(const __grid_constant__ {type(args).__name__} args) {{ {body}(args); }}"
            )
        overlaps = bool(self.launches)  # what ran before this step knows nothing of overlapping
        launch = Launch(self._names[body], grid, threads, args, overlaps=overlaps, **more)
        self.launches.append(launch)

    def _buffer(self, role: str, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Scratch [rows, width]: one for all layers, since a reader ends before the next writer."""
        key = role, width
        if key not in self._scratch:
            dtype = dtype or self._dtype
            self._scratch[key] = torch.empty(self._rows, width, dtype=dtype, device=self.device)
        return self._scratch[key]

    def _weight(self, value: Any) -> torch.Tensor:
        weight = self._parameters[value.name]
        if weight.data_ptr() % 16 or not weight.is_contiguous() or weight.shape[-1] % 8:
            raise NotFused(
                f"{value.name} {tuple(weight.shape)}: rows must be multiples of 8 elements"
            )
        return weight

    def _narrow(self, value: Any) -> torch.Tensor:
        """A weight that must be in the activations' dtype."""
        weight = self._weight(value)
        if weight.dtype != self._dtype:
            raise NotFused(f"{value.name} in {weight.dtype}, activations in {self._dtype}")
        return weight

    def _linear(
        self, y: torch.Tensor, products: list[Product], epilogue: str, activation: str = "relu"
    ) -> None:
        """Launch products that share their input; ``y`` takes their outputs side by side."""
        x, weight = products[0].x, products[0].weight
        if weight.dtype not in (torch.float32, self._dtype):
            raise NotFused(f"weights in {weight.dtype}, activations in {self._dtype}")
        if len({(p.weight.dtype, p.weight.shape, p.scale) for p in products}) > 1:
            raise NotFused("products of one input that differ in shape, dtype or scale")
        if epilogue != "STORE" and products[0].scale != 1:
            raise NotFused("a scaled product that is activated or added")
        outputs, inputs = weight.shape
        warps = self._warps(inputs)
        args = LinearArgs(y=y.data_ptr(), scale=products[0].scale)
        args.weight[: len(products)] = [product.weight.data_ptr() for product in products]
        gated = epilogue == "GATE"
        segments, weights = (1, 2) if gated else (len(products), 1)
        tiles = self._tiles(outputs * segments, warps, weights)
        if isinstance(x, Normed) and self._rows > _FUSED_NORM_ROWS:
            x = self._norm(x, inputs, warps)
        if isinstance(x, Normed):
            self._check_norm(x, inputs, warps, 8 * tiles * weights)
            args.x, args.norm, args.eps = x.residual.tensor.data_ptr(), x.weight.data_ptr(), x.eps
        else:
            args.x = x.data_ptr()
        normed = str(isinstance(x, Normed)).lower()
        sizes = f"{inputs}, {outputs}, {segments}, {tiles}, {warps}"
        kind = f"{normed}, {epilogue}, {ACTIVATIONS[activation]}"
        blocks = -(-outputs // (8 * tiles)) * segments
        body = f"linear<{_ELEMENTS[weight.dtype]}, {sizes}, {kind}>"
        self._launch(body, (blocks, 1), 32 * warps, args)

    def _warps(self, inputs: int) -> int:
        """Warps that share out a row of weights: four loads each, if a block holds so many."""
        return min(max(-(-inputs // 128), 8), 32)

    def _norm(self, x: Normed, width: int, warps: int) -> torch.Tensor:
        self._check_norm(x, width, warps, 0)
        y = self._buffer("normed", width)
        args = LinearArgs(x=x.residual.tensor.data_ptr(), y=y.data_ptr(), eps=x.eps)
        args.norm = x.weight.data_ptr()
        self._launch(f"norm<{width}, {warps}>", (self._rows, 1), 32 * warps, args)
        return y

    def _tiles(self, outputs: int, warps: int, weights: int) -> int:
        """Tiles of eight outputs that one block computes. Several read the input less often, which
        counts with many rows; few leave processors without work. The bounds are measured ones."""
        least = self._processors // (1 if self._rows == 1 else 2)
        for tiles in (4, 2):
            outputs_held = 8 * tiles * self._rows  # one a thread, and float sums of every warp
            fits = outputs_held <= 32 * warps and 4 * warps * weights * outputs_held <= 2**14
            if fits and tiles * weights <= 4 and outputs // (8 * tiles) >= least:
                return tiles
        return 1

    def _check_norm(self, x: Normed, width: int, warps: int, outputs: int) -> None:
        if x.residual.additions != self._additions:
            raise NotFused("a norm of a residual stream that has moved on")
        row_bytes = (width + 32) * self._dtype.itemsize + 4 * warps * (outputs + 1)
        fused = outputs > 0  # the normed rows stay in shared memory
        if width > 128 * warps or (fused and self._rows * row_bytes > _STATIC_SHARED):
            raise NotFused(f"{self._rows} rows of width {width} exceed a block's shared memory")

    def _attention(
        self, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, **args: Any
    ) -> torch.Tensor:
        """Launch attention of ``q`` [rows, stride] over KV buffers [B, slots, H * D]."""
        slots, width = key.shape[1:]
        head_size = width // heads
        if head_size not in HEAD_SIZES or slots > MAX_SLOTS:
            raise NotFused(
                f"head size {head_size}, {slots} slots: {HEAD_SIZES}, {MAX_SLOTS} at most"
            )
        y = self._buffer("attended", width)
        arguments = AttentionArgs(
            q=q.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            y=y.data_ptr(),
            heads=heads,
            slots=slots,
            stride=q.shape[1],
            **args,
        )
        splits = self._splits(slots, heads)
        share = -(-slots // splits)
        queries = self._queries_together(heads, splits, share)
        shared_bytes = 4 * share * queries
        masked = "table" in args and args["mask"] is not None
        if masked := masked and shared_bytes + 2 * share <= 4 * MAX_SLOTS:
            shared_bytes += 2 * share
        warps, unroll = self._attention_block(head_size, heads, queries, share)
        sizes = f"{head_size}, {warps}, {splits}, {unroll}, {queries}"
        body = f"attention<{sizes}, {str('table' in args).lower()}, {str(masked).lower()}>"
        grid = heads * splits, self._rows // queries
        self._launch(body, grid, 32 * warps, arguments, shared_bytes=shared_bytes, cluster=splits)
        return y

    def _splits(self, slots: int, heads: int) -> int:
        """Blocks that share out a row's slots: each at least 64, and not two a processor."""
        if torch.cuda.get_device_capability(self.device) < (9, 0):
            return 1  # clusters begin there
        for splits in (8, 4, 2):
            if slots >= 64 * splits and heads * self._rows * splits <= 2 * self._processors:
                return splits
        return 1

    def _queries_together(self, heads: int, splits: int, share: int) -> int:
        """Queries of one block, which reads their common keys and values once: several of a row's,
        if that leaves every processor a block."""
        if splits > 1 or heads * self._batch < self._processors:
            return 1
        most = min(4, MAX_SLOTS // share)  # four queries' sums fit the registers
        return max(n for n in range(1, most + 1) if self._queries % n == 0)

    def _attention_block(
        self, head_size: int, heads: int, queries: int, share: int
    ) -> tuple[int, int]:
        """Warps of a block, and slots of each at a time; the measured best."""
        if queries == 1:
            return max(4, head_size // 8), 4 if share > 256 else 2
        return 4 if heads * self._batch >= 3 * self._processors else 8, 2

    # The vocabulary

    def embedding(
        self, ids: torch.Tensor, weight: Any, scale: float = 1.0, offset: int = 0
    ) -> Residual:
        if scale != 1.0 or offset:
            raise NotFused("an embedding with a scale or an offset")
        table = self._narrow(weight)
        residual = self._buffer("residual", table.shape[1], torch.float32)
        args = EmbeddingArgs(
            ids=ids.data_ptr(),
            weight=table.data_ptr(),
            residual=residual.data_ptr(),
            width=table.shape[1],
        )
        self._launch("embedding", (self._rows, 1), 256, args)
        return Residual(residual, self._additions)

    def rms_norm(self, x: Residual, weight: Any, eps: float) -> Normed:
        return Normed(x, self._narrow(weight), eps)

    def add_rms_norm(
        self, residual: Residual, x: Product, weight: Any, eps: float
    ) -> tuple[Residual, Normed]:
        if residual.additions != self._additions:
            raise NotFused("an addition to a residual stream that has moved on")
        self._linear(residual.tensor, [x], "ADD")
        self._additions += 1
        total = Residual(residual.tensor, self._additions)
        return total, self.rms_norm(total, weight, eps)

    def linear(
        self,
        x: Normed | Activated | torch.Tensor,
        weight: Any,
        bias: Any = None,
        scale: float = 1.0,
        transposed: bool = False,
    ) -> Product:
        if bias is not None or transposed:
            raise NotFused("a product with a bias, or with [in, out] weights")
        if isinstance(x, Activated):
            products = [x.product] if x.gate is None else [x.product, x.gate]
            hidden = self._buffer("hidden", products[0].weight.shape[0])
            self._linear(hidden, products, "GATE" if x.gate else "ACTIVATE", x.activation)
            x = hidden
        return Product(x, self._weight(weight), scale)

    def wide_linear(self, x: Normed | Activated | torch.Tensor, weight: Any) -> Product:
        return self.linear(x, weight)  # sums stay in float32 until they meet the residual stream

    def activation(self, x: Product, name: str) -> Activated:
        if name not in ACTIVATIONS:
            raise NotFused(f"activation {name!r}: one of {sorted(ACTIVATIONS)}")
        return Activated(x, name)

    def multiply(self, x: Activated, y: Product) -> Activated:
        if x.gate is not None or y.x is not x.product.x:
            raise NotFused("a gate that is not a second product of the same input")
        return replace(x, gate=y)

    def rows_kept(self, x: Normed, kept: torch.Tensor) -> Normed:
        return x  # a step keeps all its tokens

    def attention(
        self,
        q: Product,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        heads: int,
        scale: float = 1.0,
    ) -> torch.Tensor:
        if scale != 1.0:
            raise NotFused("attention with a scale")
        if bias is None or tuple(bias.shape) != (self._batch, 1, self._queries, k.shape[1]):
            raise NotFused("attention with another bias than a mask over sources")
        query = self._buffer("query", q.weight.shape[0])
        self._linear(query, [q], "STORE")
        return self._attention(query, k, v, heads, mask=bias.data_ptr())

    def cached_attention(
        self,
        q: Product,
        k: Product,
        v: Product,
        slots: KVSlots,
        bias: Bias,
        heads: int,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if scale != 1.0:
            raise NotFused("attention with a scale")
        if bias.table is None or bias.row_start is not None:
            raise NotFused("attention without a table of positions, or with rows that begin late")
        if not q.x is k.x is v.x:
            raise NotFused("query, key and value are products of different inputs")
        fused = self._buffer("query, key, value", 3 * q.weight.shape[0])
        self._linear(fused, [q, k, v], "STORE")
        attended = self._attention(
            *(fused, slots.key, slots.value, heads),
            table=bias.table.data_ptr(),
            mask=None if bias.mask is None else bias.mask.data_ptr(),
            query_positions=bias.query_positions.data_ptr(),
            slot_positions=bias.slot_positions.data_ptr(),
            first_slot=slots.first_slot.data_ptr(),
            span=bias.table.shape[-1],
            low=-bias.reach,
            high=1,
        )
        return attended, slots.key, slots.value

    def store(self, x: Product, y: torch.Tensor) -> None:
        """Give the step's result ``x`` in the tensor ``y`` [B, Q, outputs]."""
        self._linear(y, [x], "STORE")
