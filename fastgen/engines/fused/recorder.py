"""What a step is recorded as: launches in their order, their scratch and the source they need."""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import torch

from fastgen.blockwise import Blocks, Format
from fastgen.engines import NotFused
from fastgen.engines.fused.values import Matrix
from fastgen.engines.nvrtc import ELEMENTS, Launch
from fastgen.ops import names
from fastgen.target import Target

_SOURCES = (
    *("common.cu", "tiles.cu", "weights.cu", "products.cu", "linear.cu"),
    *("rotary.cu", "attention.cu", "attention_wide.cu"),
)
REGISTERS = 2**16  # of a processor
_LEAST_REGISTERS = 64  # that a thread needs, about
_WARP_INPUTS = 64  # of a weight of fewer bits that a warp reads at a time: all of one group


def narrow_results(target: Target) -> Callable[..., None]:
    """What refuses operations, by their names, whose results are to be float32 (``Target.wide``):
    for those that kernels give in the compute dtype. Sums of the residual stream, and what is only
    added to them, have float32 anyway."""
    choice = names.Choice(target)

    def check(*operations: str) -> None:
        for name in operations:
            if name in choice:
                raise NotFused(f"{name} is to be float32, which fused kernels give in float16")

    return check


@dataclass(frozen=True)
class Narrow:
    """A weight that a model has in fewer bits."""

    form: Format
    """In which kernels read it."""
    shape: tuple[int, int]
    """Outputs and inputs."""


class Recorder:
    """The launches of one step over given tensors."""

    def __init__(
        self,
        target: Target,
        parameters: Mapping[str, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        held: Mapping[str, Narrow] = MappingProxyType({}),
    ) -> None:
        self._held = held
        self.builder = names.Builder()
        self.target = target
        self.device = tensors["input_ids"].device
        self.launches: list[Launch | Callable[[int], None]] = []
        """In their order; a function queues work on torch's current stream, given its handle."""
        self._rounds = narrow_results(target)
        self._parameters = parameters
        self.made: dict[str, torch.Tensor] = {}
        """Weights of fewer bits that are read, values and scales, by name."""
        self._tensors = dict(tensors)  # launches hold only pointers to them
        self._dtype = getattr(torch, target.dtype)
        self._batch, self._queries = tensors["input_ids"].shape
        self._rows = self._batch * self._queries
        self._names: dict[tuple[str, str], str] = {}  # of kernels, by instantiation and bounds
        self._kernels: list[str] = []
        self._scratch: dict[tuple[str, int], torch.Tensor] = {}
        self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count

    @property
    def _tile_rows(self) -> int:
        """Rows of the products that kernels compute."""
        return self._rows

    @property
    def query_count(self) -> int | str:
        """Query tokens that share a row's KV buffer, as kernels read it."""
        return self._queries

    def source(self) -> str:
        """CUDA source of every kernel that the recorded launches name."""
        head = {"T": ELEMENTS[self._dtype], "ROWS": self._tile_rows, "QUERIES": self.query_count}
        lines = [f"#define {name} {value}" for name, value in head.items()]
        folder = files("fastgen.engines.fused")
        lines += [folder.joinpath(name).read_text() for name in _SOURCES]
        return "\n".join([*lines, *self._kernels])

    def _launch(
        self,
        body: str,
        grid: tuple[int, int],
        threads: int,
        args: ctypes.Structure,
        together: int | None = None,
        **more: int,
    ) -> None:
        """Launch an instantiation of a kernel template; ``together``: blocks of a processor."""
        alone = more.get("cluster", 1) == 1  # a cluster's blocks are placed together anyway
        if together is None:
            together = self._together(grid[0] * grid[1], threads) if alone else 1
        bounds = f"{threads}, {together}" if together > 1 else f"{threads}"
        if (body, bounds) not in self._names:
            name = f"{body.split('<')[0]}_{len(self._names)}"
            self._names[body, bounds] = name
            self._kernels.append(
                f'extern "C" __global__ void __launch_bounds__({bounds}) {name}'
                f"(const __grid_constant__ {type(args).__name__} args) {{ {body}(args); }}"
            )
        overlaps = bool(self.launches)  # what ran before this step knows nothing of overlapping
        launch = Launch(self._names[body, bounds], grid, threads, args, overlaps=overlaps, **more)
        self.launches.append(launch)

    def _together(self, blocks: int, threads: int) -> int:
        """Blocks that a processor should hold: with one less some would wait until all others have
        ended. More of them leave each thread fewer registers."""
        wanted = -(-blocks // self._processors)
        fits = REGISTERS // (threads * _LEAST_REGISTERS)
        return wanted if 1 < wanted <= min(fits, 4) else 1

    def _buffer(self, role: str, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Scratch [rows, width]: one for all layers, since a reader ends before the next writer."""
        key = role, width
        if key not in self._scratch:
            dtype = dtype or self._dtype
            self._scratch[key] = torch.empty(self._rows, width, dtype=dtype, device=self.device)
        return self._scratch[key]

    def _parameter(self, value: Any) -> torch.Tensor:
        return self._parameters[value.name].detach()

    def _weight(self, value: Any) -> torch.Tensor:
        weight = self._parameter(value)
        if weight.data_ptr() % 16 or not weight.is_contiguous() or weight.shape[-1] % 8:
            raise NotFused(
                f"{value.name} {tuple(weight.shape)}: rows must be multiples of 8 elements"
            )
        return weight

    def _matrix(self, value: Any, transposed: bool) -> Matrix:
        """What a product multiplies by in place of a parameter, [in, out] where ``transposed``."""
        if (held := self._held.get(value.name)) is not None:
            return self._narrow_matrix(value.name, held)
        kind, parameter = self.target.weights, self._parameters[value.name]
        dtype, (first, second) = parameter.dtype, parameter.shape  # its numbers may be let go
        if kind == "full":
            weight = self._weight(value)
            if dtype not in (torch.float32, self._dtype):
                raise NotFused(f"{value.name} in {dtype}, activations in {self._dtype}")
            if transposed and first % 8:
                raise NotFused(f"{value.name} {(first, second)}: both must be multiples of 8")
            return Matrix(weight, (first, second) if transposed else (second, first), transposed)
        form = Format(kind, self.target.group, transposed)
        shape = (second, first) if transposed else (first, second)
        return self._narrow_matrix(value.name, Narrow(form, shape))

    def _narrow_matrix(self, name: str, weight: Narrow) -> Matrix:
        """What stands for a parameter in fewer bits."""
        form, (outputs, inputs) = weight.form, weight.shape
        if self._dtype == torch.float32:
            raise NotFused(f"{form.kind} weights with activations in float32")
        least = 16 if form.by_rows else 8
        if inputs % least or form.group % _WARP_INPUTS:
            raise NotFused(
                f"{form.kind} of {name}, {inputs} inputs in groups of {form.group}: fused "
                f"kernels serve multiples of {least}, groups of multiples of {_WARP_INPUTS}"
            )
        made = {name: self._parameters[name] for name in form.names(name)}
        self.made |= made
        values, scales, *zeros = made.values()
        blocks = Blocks(values, scales, form.kind, *zeros)
        return Matrix(values, (inputs, outputs), blocks=blocks)

    def _narrow(self, value: Any) -> torch.Tensor:
        """A weight that must be in the activations' dtype."""
        weight = self._weight(value)
        if weight.dtype != self._dtype:
            raise NotFused(f"{value.name} in {weight.dtype}, activations in {self._dtype}")
        return weight
