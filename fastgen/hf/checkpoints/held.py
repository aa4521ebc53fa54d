"""A Linear's weight in fewer bits: what all libraries' have in common, and what tells of edits."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastgen.blockwise import BITS, GROUPS, Blocks, Format, Kind, blocks_of
from fastgen.engines import NoEngine
from fastgen.hf.let_go import Gone

_LEAST_GROUP = 16  # of ONNX Runtime's kernels
_KERNELS_LEAST = 64  # of fused kernels, whose groups are multiples of it


@dataclass(frozen=True)
class Integers:
    """A weight [N, K] as a library's own numbers say it: ``(steps - zeros) * scales``.

    Each scale and zero is of K / S inputs.
    """

    steps: torch.Tensor
    """int8 [N, K] around 0, or float8_e4m3fn."""
    scales: torch.Tensor
    """[N, S], of a floating dtype."""
    zeros: torch.Tensor | None
    """int8 [N, S]; None: all are 0."""


def _around(values: torch.Tensor, middle: int) -> torch.Tensor:
    """int8 as uint8 around another number than zero."""
    return (values.view(torch.uint8) + middle).contiguous()  # modulo 256


@dataclass(frozen=True, eq=False)
class Held:
    """The weight of one module in fewer bits. It keeps neither the module nor the weight alive."""

    library: str
    kind: Kind
    group: int
    """Inputs that share a scale, as the library has it."""
    zeros: bool
    """Whether the value that means zero is not the one in the middle."""
    shape: tuple[int, int]
    """Outputs and inputs."""
    part: "weakref.ref[torch.nn.Module]"
    leaf: str
    """Name of the module's tensor that holds the values, which may be let go."""
    unpack: Callable[[torch.nn.Module], Integers]
    inside: Callable[[torch.nn.Module], Sequence[torch.Tensor]]
    """The plain tensors that it is made of."""
    rounds: str | None = None
    """What the library rounds beside the weight, in words: its results are then its own."""

    def _module(self) -> torch.nn.Module:
        part = self.part()
        assert part is not None, "the module is gone"
        return part

    @property
    def holder(self) -> torch.Tensor:
        """The tensor that holds the values, or what is left of it."""
        part = self._module()
        found: torch.Tensor | None = part._parameters.get(self.leaf)
        if found is None:
            found = part._buffers[self.leaf]
        assert found is not None
        return found

    @property
    def whole(self) -> bool:
        """Whether graphs read its numbers in full: they have no products by 8-bit floats."""
        return self.kind == "fp8"

    def form(self, exact: bool, on_gpu: bool = False) -> Format:
        """How graphs read it, if not ``whole``.

        Args:
            exact: on a CPU, by inputs in float32 as they are.
            on_gpu: where kernels take large groups only, to which whole rows are filled up.
        """
        halves = exact and self.kind == "int8"
        group = _power_within(self.group) or 0
        least = _KERNELS_LEAST if on_gpu and self.group == self.shape[1] else 1
        group = group if group >= least else GROUPS[self.kind]
        return Format(self.kind, group, zeros=self.zeros or halves, halves=halves)

    def form_of_kernels(self) -> Format:
        """How fused kernels read it: as the library holds it, if it lies as they take it."""
        if self.kind == "fp8":
            return Format("fp8", 0)
        inputs, whole = self.shape[1], self.group == self.shape[1]
        steps = self.unpack(self._module()).steps
        lies = steps.is_contiguous() and not (steps.data_ptr() % 16 or inputs % 16)
        if self.kind == "int8" and lies:
            if whole and not self.zeros:
                return Format("int8", 0)
            if inputs % self.group == self.group % _KERNELS_LEAST == 0:
                return Format("int8", self.group, zeros=self.zeros, signed=True)
        return self.form(exact=False, on_gpu=True)

    def blocks(self, form: Format, dtype: torch.dtype) -> Blocks:
        """What engines read, the very same values: in their own layout, or as the library's lie.

        Args:
            dtype: of the scales in a layout of engines' own.
        """
        with torch.inference_mode(False), torch.no_grad():
            known = self.unpack(self._module())
            if form.kind != self.kind:
                raise NoEngine(f"{form.kind} of what {self.library} has made {self.kind}")
            if form.by_rows:
                return Blocks(known.steps, known.scales.float().contiguous(), form.kind)
            steps, scales, zeros = known.steps, known.scales, known.zeros
            if form.signed:
                steps = steps.unflatten(1, (-1, form.group))
                zeros = None if zeros is None else zeros.contiguous()
                return Blocks(steps, scales.contiguous(), form.kind, zeros)
            middle = 2 ** (BITS[form.kind] - 1)
            zeros = None if zeros is None else _around(zeros, middle)
            return blocks_of(_around(steps, middle), scales.to(dtype), zeros, form)

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """What it stands for in full, of a scale for each row."""
        with torch.inference_mode(False), torch.no_grad():
            known = self.unpack(self._module())
            return (known.steps.float() * known.scales.float()).to(dtype)


def group_refusal(group: int, inputs: int) -> str | None:
    """Why no engine takes so many inputs to a scale; a whole row may be of any size."""
    if group == inputs or (inputs % group == 0 and _power_within(group)):
        return None
    return f"groups of {group} inputs, where {inputs} in multiples of {_LEAST_GROUP} are served"


def _power_within(group: int) -> int | None:
    """The largest power of two that divides a group, up to 128; None if that is too small."""
    power = min(group & -group, 128)
    return power if power >= _LEAST_GROUP else None


class Looked:
    """What a held weight was when it was looked at."""

    def __init__(self, held: Held) -> None:
        self._of, self._kind = held, type(held.holder)
        self._places = self._look()

    def same(self) -> bool:
        """Whether its tensors are where they were, without an edit that torch counts."""
        holder = self._of.holder
        if isinstance(holder, Gone):
            return True
        return type(holder) is self._kind and self._look() == self._places

    def _look(self) -> list[tuple[int, int]]:
        part = self._of.part()
        tensors = [] if part is None else self._of.inside(part)
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
