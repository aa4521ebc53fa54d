"""Weights of fewer bits: blocks of values that share a scale, and how tensors of them are named.

N outputs, K inputs, G inputs of a block. A weight is [N, K] here, however its module lays it out.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import get_args

import torch

from fastgen.options import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)

GROUPS: dict[str, int] = {"int8": 128, "int4": 64, "fp8": 0}
"""Inputs that share a scale, unless a Target says otherwise; 0 is a whole row."""

BITS = {"int8": 8, "int4": 4}
"""Of a value, of the kinds whose values share a scale by blocks."""
_ROWS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""Of the kinds that a whole row may share a scale of: the values' dtype, and their largest."""
_FEW = {"cpu": 2**15, "cuda": 2**24}
"""Elements that are worked on at once. On a CPU as many as torch computes in one thread: its own
threads wait for each other after each operation, which takes long where other programs run."""


_PARTS = "values", "scales", "zeros"


@dataclass(frozen=True)
class Format:
    """How a weight is held: its kind, the inputs that share a scale, and whether the parameter that
    it is made of is [in, out]."""

    kind: Kind
    group: int
    transposed: bool = False
    zeros: bool = False
    """Each block says which of its values means zero; otherwise it is the one in the middle."""
    signed: bool = False
    """Of int8: values, and zeros if there are any, are around 0, as a library's own lie."""
    halves: bool = False
    """Of int8: as int4 of twice the inputs, first the high four bits of all, then the low ones. On
    a CPU ONNX Runtime multiplies float32 by 4 bits as they are, by 8 only once both are rounded."""

    @property
    def by_rows(self) -> bool:
        """Whether all inputs share a scale."""
        return self.kind == "fp8" or self.group == 0

    @property
    def as_held(self) -> bool:
        """Of a checkpoint's weight: whether the values are the library's own, not a copy."""
        return self.signed or self.by_rows

    def names(self, parameter: str) -> tuple[str, ...]:
        """What a Graph calls the values, the scales and, if there are any, the zeros of a parameter
        in this format."""
        flags = "transposed", "zeros", "signed", "halves"
        form = "-".join([self.kind, str(self.group), *(f for f in flags if getattr(self, f))])
        return tuple(f"{parameter}:{form}:{part}" for part in _PARTS[: 2 + self.zeros])

    def shapes(self, outputs: int, inputs: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of ``names``, for a weight [outputs, inputs]."""
        if self.by_rows:
            return (outputs, inputs), (outputs, 1)
        blocks, bits = math.ceil(inputs / self.group), BITS[self.kind]
        if self.halves:
            blocks, bits = 2 * blocks, BITS["int4"]
        zeros = ((outputs, math.ceil(blocks * bits / 8)),) * self.zeros
        return (outputs, blocks, self.group * bits // 8), (outputs, blocks), *zeros

    def dtypes(self, weight: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Of the values and of the scales of a weight of that dtype."""
        if self.by_rows:
            return _ROWS[self.kind][0], torch.float32
        return torch.int8 if self.signed else torch.uint8, weight


def is_made(name: str) -> bool:
    """Whether a tensor of this name is made of a parameter: by ``Format.names`` or another's."""
    return ":" in name


def parse(name: str) -> tuple[str, Format, int] | None:
    """The inverse of ``Format.names``: the parameter, its format, and which of the three this is;
    None if it is the name of a parameter as it is."""
    parameter, *form = name.split(":")
    kind, *sizes = form[0].split("-") if form else ("",)
    if kind not in KINDS:
        return None
    group, *flags = sizes
    return parameter, Format(kind, int(group), **dict.fromkeys(flags, True)), _PARTS.index(form[1])


@dataclass(frozen=True)
class Blocks:
    """A weight [N, K] in fewer bits.

    ``values``: int8 is uint8 [N, ceil(K / G), G] around 128; int4 is uint8 [N, ceil(K / G), G / 2]
    around 8, the even input in the low four bits. ``scales``: [N, ceil(K / G)] in the weight's
    dtype, of either sign. Inputs behind the K-th are the value that means zero.
    ``zeros``: what stands for 128 or 8 in each block, uint8: [N, ceil(K / G)]; of int4 two in a
    byte, [N, ceil(K / G / 2)], the even block in the low four bits. None if it is 128 or 8.
    Of int8 both may be around 0, and are int8 then. By whole rows (G is 0) ``values`` are [N, K],
    int8 around 0 or float8_e4m3fn, and ``scales`` float32 [N, 1].
    """

    values: torch.Tensor
    scales: torch.Tensor
    kind: Kind
    zeros: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.values.nbytes + self.scales.nbytes + zeros

    def part(self, which: int) -> torch.Tensor:
        """Values, scales or zeros, as ``parse`` counts them."""
        tensor = (self.values, self.scales, self.zeros)[which]
        assert tensor is not None
        return tensor


def quantise(weight: torch.Tensor, kind: Kind, group: int | None = None) -> Blocks:
    """A weight [N, K] in fewer bits, rounded to the nearest, on its own device.

    Args:
        weight: float32, float16 or bfloat16, of finite numbers.
        group: inputs that share a scale, 16 or more and a power of two, or 0 (of int8 and fp8) for
            a whole row; None takes ``GROUPS``.

    Raises:
        ValueError: the kind is unknown, or the weight holds an infinity or NaN.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(map(repr, KINDS))}.")
    form = Format(kind, GROUPS[kind] if group is None else group)
    weight = weight.detach()
    shapes = form.shapes(*weight.shape)
    dtypes, whole = form.dtypes(weight.dtype), form.by_rows
    with torch.inference_mode(False):  # the threads below are in no such mode
        values = torch.empty(shapes[0], dtype=dtypes[0], device=weight.device)
        scales = torch.empty(shapes[1], dtype=dtypes[1], device=weight.device)
    rows = max(1, _FEW[weight.device.type] // max(1, weight.shape[1]))

    def fill(at: int) -> None:
        part, some = weight[at : at + rows].float(), slice(at, at + rows)
        if not torch.isfinite(part).all():
            raise ValueError("a weight with an infinity or NaN has no form of fewer bits")
        if whole:
            scales[some] = _nonzero(part.abs().amax(1, keepdim=True) / _ROWS[kind][1])
            steps = part / scales[some]
            values[some] = (steps.round_() if kind == "int8" else steps).to(dtypes[0])
        else:
            values[some], scales[some] = _blocks(part, form, scales.dtype)

    starts = range(0, len(weight), rows)
    if weight.device.type == "cpu" and len(starts) > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            deque(threads.map(fill, starts), maxlen=0)  # raises what one of them raised
    else:
        deque(map(fill, starts), maxlen=0)
    return Blocks(values, scales, kind)


def dequantise(blocks: Blocks, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of that shape that the blocks stand for, computed in float32."""
    scales = blocks.scales.float()
    if blocks.values.ndim == 2:
        return (blocks.values.float() * scales).to(dtype)
    values, zeros = blocks.values, blocks.zeros
    if blocks.kind == "int4":
        values = _unpacked(values)
        zeros = None if zeros is None else _unpacked(zeros)[:, : scales.shape[1]]
    signed = values.dtype == torch.int8
    middle = 0.0 if signed else 2.0 ** (BITS[blocks.kind] - 1)
    centred = values.float() - (middle if zeros is None else zeros.float().unsqueeze(-1))
    whole = (centred * scales.unsqueeze(-1)).flatten(1)
    return whole[:, : shape[1]].to(dtype)


def blocks_of(
    steps: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, form: Format
) -> Blocks:
    """Blocks of what somebody else has rounded.

    Args:
        steps: uint8 [N, K], of int4 up to 15.
        scales: [N, S]; each is of K / S inputs, a multiple of the format's group, or of all.
        zeros: uint8 [N, S], the step that means zero; None is the one in the middle.
    """
    inputs, group = steps.shape[1], form.group
    middle = 2 ** (BITS[form.kind] - 1)
    if form.zeros and zeros is None:
        zeros = torch.full_like(scales, middle, dtype=torch.uint8)
    blocks = math.ceil(inputs / group)
    times = math.ceil(blocks / scales.shape[1])
    scales = scales.repeat_interleave(times, 1)[:, :blocks].contiguous()
    zeros = None if zeros is None else zeros.repeat_interleave(times, 1)[:, :blocks].contiguous()
    if padding := blocks * group - inputs:
        last = torch.full_like(steps[:, :1], middle) if zeros is None else zeros[:, -1:]
        steps = torch.cat((steps, last.expand(-1, padding)), 1)
    values = steps.unflatten(1, (blocks, group))
    if form.halves:
        assert zeros is not None
        values = torch.cat((values >> 4, values & 15), 1)
        scales = torch.cat((16 * scales, scales), 1)
        zeros = torch.cat((zeros >> 4, zeros & 15), 1)
    if form.halves or form.kind == "int4":
        values, zeros = _packed(values), None if zeros is None else _packed(zeros)
    return Blocks(values.contiguous(), scales, "int4" if form.halves else form.kind, zeros)


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Numbers up to 15 as uint8 [.., n] -> two in a byte, [.., ceil(n / 2)], the even one low."""
    values = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    return values[..., 0::2] | values[..., 1::2] << 4


def _unpacked(pairs: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_packed``: [.., n] -> [.., 2 * n]."""
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def _blocks(
    part: torch.Tensor, form: Format, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of some rows [N, K] of float32."""
    half = 2 ** (BITS[form.kind] - 1)  # steps below zero; one fewer above
    padding = -part.shape[1] % form.group
    grouped = torch.nn.functional.pad(part, (0, padding)).unflatten(1, (-1, form.group))
    # With few steps none is wasted: the number farthest from zero is the one below all others
    farthest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True)).squeeze(2)
    scales = farthest / -half if form.kind == "int4" else farthest.abs() / (half - 1)
    scales = _nonzero(scales.to(dtype))
    steps = torch.round(grouped / scales.float().unsqueeze(2)).clamp(-half, half - 1)
    values = (steps + half).to(torch.uint8)
    return _packed(values) if form.kind == "int4" else values, scales


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    """Scales to divide by: what is all zeros, or too small for the dtype, has the scale 1."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
