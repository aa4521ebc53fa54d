"""A prompt's tokens on the fused kernels: they write keys and values, and give nothing else."""

from collections.abc import Callable

import torch

from fastgen.engines.fused.engine import FusedEngine
from fastgen.execution.bucket import Bucket


class Prompt:
    """Tokens of a prompt, at most [B, Q], over a bucket's slots, and what runs them."""

    def __init__(self, fused: FusedEngine, bucket: Bucket, queries: int, filled: int) -> None:
        ids = torch.zeros(bucket.size.batch, queries, dtype=torch.int64, device=bucket.device)
        self._ids, self._places = ids, torch.arange(queries, device=bucket.device)
        self._positions = self._places.clone()
        names = "slot_positions", "first_slot", "row_start"
        shared = {name: bucket.tensors[name] for name in names}
        shared |= {name: bucket.tensors[name] for name in bucket.shape.kv_names("self")}
        own = {"input_ids": ids, "query_positions": self._positions[:, None]}
        self.run: Callable[[], None] = fused.bind_prompt(shared | own, filled).run

    def fill(self, input_ids: torch.Tensor, length: int) -> None:
        """Let these tokens follow ``length`` others; behind them are some that nobody reads."""
        self._ids[:, : input_ids.shape[1]] = input_ids
        torch.add(self._places, length, out=self._positions)
