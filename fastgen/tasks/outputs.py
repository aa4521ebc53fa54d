"""What a ``forward`` on the engine gives: hidden states and outputs of the stock class's kind."""

from collections.abc import Sequence
from typing import Any

import torch

from fastgen.hf.module import EngineModule


def as_stock(module: EngineModule, states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Hidden states in the dtypes that the stock stack gives: from the first layer on, float32
    where it keeps some weights so."""
    own = next(module.parameters()).dtype
    first, *inner = states
    last = [_cast(inner.pop(), own)] if inner else []
    kept = any(p.dtype == torch.float32 for p in module.parameters())
    wide = torch.float32 if kept else own
    return _cast(first, own), *(_cast(state, wide) for state in inner), *last


def _cast(state: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float16 != state.dtype:  # stock clamps, too
        largest = torch.finfo(dtype).max
        state = state.clamp(-largest, largest)
    return state.to(dtype)


_introduced: set[type] = set()


def introduce(stack_class: type, config: Any) -> None:
    """Let transformers learn which outputs a stack can record: it does when one is constructed,
    and ours took the place of a stock one (or came out of a pickle)."""
    if stack_class not in _introduced:
        with torch.device("meta"):
            stack_class(config)
        _introduced.add(stack_class)


def wants_dict(module: EngineModule, asked: bool | None) -> bool:
    return bool(module.config.return_dict if asked is None else asked)
