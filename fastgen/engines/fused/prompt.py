"""FusedOps for the tokens of a prompt: keys and values are written, and nothing is chosen."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from fastgen.engines import NotFused
from fastgen.engines.fused.recorder import Narrow
from fastgen.engines.fused.rotary import Factor
from fastgen.engines.fused.values import Part, Product
from fastgen.engines.fused.wide import WideOps
from fastgen.ops.values import Bias, KVSlots
from fastgen.target import Target

KERNEL_ROWS = 512
"""Up to here the step's attention kernel serves; torch's flash attention more."""


class PromptOps(WideOps):
    """Query tokens [B, Q] behind ``filled`` slots, without a source. Launches that no keys and
    values come of are left out in the end, see ``trim``."""

    query_count = "(args.queries)"  # one program serves prompts of every length

    def __init__(
        self,
        target: Target,
        parameters: Mapping[str, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        filled: int,
        held: Mapping[str, Narrow] = MappingProxyType({}),
    ) -> None:
        super().__init__(target, parameters, tensors, held)
        self._filled, self._needed = filled, 0
        self._flash = self._rows > KERNEL_ROWS
        if self._flash and self._dtype == torch.float32:
            raise NotFused(f"{self._rows} tokens in float32: flash attention has 16 bits")

    def trim(self) -> None:
        """Leave out what follows the last keys and values."""
        del self.launches[self._needed :]

    def _queries_together(self, heads: int, splits: int, most: int) -> int:
        many = splits == 1 and heads * self._rows >= 4 * self._processors
        most = min(4 if many else 2, most)
        return max(n for n in (1, 2, 4) if n <= most and self._queries % n == 0)

    def cached_attention(
        self,
        q: Factor,
        k: Factor,
        v: Product | Part,
        slots: KVSlots,
        bias: Bias,
        heads: int,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._flash:
            attended = self._flash_attention(q, k, v, slots, bias, heads, scale)
        else:
            attended, _, _ = super().cached_attention(q, k, v, slots, bias, heads, scale)
        self._needed = len(self.launches)
        return attended, slots.key, slots.value

    def _flash_attention(
        self,
        q: Factor,
        k: Factor,
        v: Product | Part,
        slots: KVSlots,
        bias: Bias,
        heads: int,
        scale: float,
    ) -> torch.Tensor:
        if bias.table is not None or bias.mask is not None:
            raise NotFused("flash attention with a table of positions or a mask")
        rows, _ = self._query_key_value(q, k, v, heads, slots, bias)
        kept_width = slots.key.shape[2]
        widths = rows.shape[1] - 2 * kept_width, kept_width, kept_width
        parts = rows.view(self._batch, self._queries, -1).split(widths, dim=2)
        head_size = widths[0] // heads
        query, *new = (x.unflatten(2, (-1, head_size)) for x in parts)
        filled = slice(self._filled, self._filled + self._queries)
        kept = [x.unflatten(2, (-1, head_size)) for x in (slots.key, slots.value)]
        segments = self._segments(bias.row_start, slots.key.shape[1])
        y = self._buffer("attended", widths[0])

        def launch(stream: int) -> None:
            for buffer, values in zip(kept, new, strict=True):
                buffer[:, filled].copy_(values)
            found = torch.ops.aten._flash_attention_forward(
                *(x.flatten(0, 1) for x in (query, *kept)),
                *(*segments, self._queries, self._filled + self._queries),
                *(0.0, True, False),  # no dropout; causal from the end; nothing to debug
                scale=scale,
            )[0]
            y.copy_(found.flatten(1))

        self.launches.append(launch)
        return y

    def _segments(
        self, row_start: torch.Tensor | None, slots: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where sequences begin among all queries and among all slots, int32 [3 * B + 1]: of each
        row what lies before its start, its tokens so far, and slots that are not filled yet."""
        key = "segments", 0
        if key not in self._scratch:
            sizes = torch.zeros(2, 3 * self._batch + 1, dtype=torch.int32, device=self.device)
            self._scratch[key] = sizes
            end = self._filled + self._queries

            def launch(stream: int) -> None:
                starts = sizes.new_zeros(self._batch) if row_start is None else row_start[:, 0]
                before = starts.clamp(max=end)
                hidden = (before - self._filled).clamp(min=0)  # of the queries
                zeros = torch.zeros_like(before)
                lengths = (
                    (hidden, self._queries - hidden, zeros),
                    (before, end - before, zeros + slots - end),
                )
                for each, out in zip(lengths, sizes, strict=True):
                    out[1:] = torch.stack(each, dim=1).flatten().cumsum(0)

            self.launches.append(launch)
        queries, keys = self._scratch[key].unbind()
        return queries, keys
