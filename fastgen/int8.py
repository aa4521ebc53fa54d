"""Weights as 8-bit integers with a step for each output, and how tensors of them are named."""

from dataclasses import dataclass

import torch

_FORM = "rows"
_FEW = 2**20  # elements that are worked on at once, which bounds what is held in float32


@dataclass(frozen=True)
class Rows:
    """How the integers of a weight lie."""

    transposed: bool
    """The parameter that they are made of is [in, out]."""
    inputs_first: bool
    """They are [in, out], else [out, in]."""
    unsigned: bool
    """They are uint8 around 128, else int8."""

    def names(self, parameter: str) -> tuple[str, str]:
        """What a Graph calls the integers of a parameter, and their steps."""
        flags = "".join(str(int(flag)) for flag in vars(self).values())
        return f"{parameter}:{_FORM}-{flags}:values", f"{parameter}:{_FORM}-{flags}:steps"


def source(name: str) -> str | None:
    """The parameter that a tensor of this name is made of; None if it is no such name."""
    parts = name.split(":")
    return parts[0] if len(parts) == 3 and parts[1].startswith(f"{_FORM}-") else None


def made(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor of this name (see ``Rows.names``), of a matrix of float32, float16 or bfloat16.

    Values are int8 or uint8, rounded to the nearest; steps [N] have the parameter's dtype.
    """
    _, form, which = name.split(":")
    rows = Rows(*(flag == "1" for flag in form.removeprefix(f"{_FORM}-")))
    weight = parameter.detach().t() if rows.transposed else parameter.detach()
    steps = row_steps(weight)
    if which == "steps":
        return steps
    outputs, inputs = weight.shape
    shape = (inputs, outputs) if rows.inputs_first else (outputs, inputs)
    dtype = torch.uint8 if rows.unsigned else torch.int8
    values = torch.empty(shape, dtype=dtype, device=weight.device)
    by_row = values.t() if rows.inputs_first else values
    few = max(1, _FEW // max(1, inputs))
    for first in range(0, outputs, few):
        part = slice(first, first + few)
        whole = weight[part].float() / steps[part].float()[:, None]
        by_row[part] = (whole.round_().clamp_(-127, 127) + 128 * rows.unsigned).to(dtype)
    return values


def row_steps(weight: torch.Tensor) -> torch.Tensor:
    """The step of each output of a weight [N, K]: 127 of them reach its largest number."""
    largest = weight.abs().amax(1).float()
    steps = (largest / 127).to(weight.dtype)
    return torch.where(steps == 0, torch.ones_like(steps), steps)
