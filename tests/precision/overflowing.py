"""Models whose weights are scaled until naive float16 overflows, of every family."""

import copy
from typing import Any

import torch

from tests.configs import EVERY, build_pair
from tests.models.test_bert import build

#: What is scaled, and by how much: what feed-forwards give exceeds 65504, as T5-XXL's does.
FAMILIES: dict[str, tuple[str, float]] = {
    "t5-1.0": (".wo.weight", 2e4),
    "t5-1.1": (".wo.weight", 2e4),
    "mt5": (".wo.weight", 2e4),
    "umt5": (".wo.weight", 2e4),
    "gpt2": (".mlp.c_proj.weight", 2e4),
    "bart": (".fc2.weight", 1e5),
    "bert": (".output.dense.weight", 5e4),
}


def scaled(name: str, part: str = "", factor: float = 1.0) -> Any:
    """A Fast model in float32 on the CPU, its weights of one kind scaled; they fit float16."""
    whole = build_pair(name) if name in EVERY else build("Model", "tiny")
    model = copy.deepcopy(whole.fast)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if part and f".{key}".endswith(part):
                parameter.mul_(factor)
            # float16 models have float16 weights: what else they differ by is looked at here
            parameter.copy_(parameter.half().float())
            assert parameter.isfinite().all(), f"{key} overflows float16 itself"
    return model
