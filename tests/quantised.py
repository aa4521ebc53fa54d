"""What an engine with weights of fewer bits computes on a CPU, in torch."""

import copy
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from fastgen.blockwise import GROUPS, dequantise, quantise


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """What a CPU's kernel reads of its input [.., K]: each block in 127 steps to either side."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    scales = padded.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(scales == 0, 0, (padded / scales).round() * scales)
    return whole.flatten(-2)[..., : x.shape[-1]]


def standing_for(stock: Any, kind: Any, but: str = "no such part") -> Any:
    """A copy of a stock model whose products read weights, and inputs, rounded as an engine's.

    Args:
        but: prefix of the names of products that stay.
    """
    model, group = copy.deepcopy(stock), GROUPS[kind]
    for name, part in model.named_modules():
        if name.startswith(but) or not isinstance(part, (torch.nn.Linear, Conv1D)):
            continue
        whole = part.weight.T if isinstance(part, Conv1D) else part.weight
        weight = dequantise(quantise(whole, kind), tuple(whole.shape), torch.float32)  # type: ignore[arg-type]
        weight = weight.T.contiguous() if isinstance(part, Conv1D) else weight
        part.weight = torch.nn.Parameter(weight)  # an embedding tied to it stays
        part.register_forward_pre_hook(lambda _, given: (rounded(given[0], group), *given[1:]))
    return model
