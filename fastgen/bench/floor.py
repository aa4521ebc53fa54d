"""The least time a call could take: what must be moved and computed, over what the machine does.

A token of ``generate`` moves, on average over the steps of a call (R = batch * beams rows, P tokens
of a prompt, N new ones):

- every weight of the decoder and its head once; but of lookup tables a row for each of the R rows,
  and nothing of the weights that make cross-attention's keys and values, once a call. A table that
  is also the head counts as the head;
- keys and values, 2 * layers * width for each token so far: the new ones written, the others read.
  Beams share those of a prompt: batch * P + R * (N - 1) / 2 tokens. With an encoder the prompt is
  the decoder's start token, which they do not share, and batch * P tokens of the source are read;
- logits: R * vocabulary written.

It computes 2 operations for each of those weights and each row, and 4 * width for each layer, row
and token attended to. The run over the prompt and the encoder's count nothing: the share of the
floor is lower for them.

A call of an encoder moves its weights once, of tables a row for each token, and writes its hidden
states. It computes 2 operations for each weight and *real* token, whatever a library does with
padding (of a pooler: for each row), and 4 * width for each layer and pair of tokens of a row.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fastgen.bench.workload import AnyWorkload, Encoding, Workload

_ONCE_A_CALL = re.compile(r"(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj)\.")
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_SECONDS = 0.2


@dataclass(frozen=True)
class Machine:
    """What this device does at best."""

    bytes_per_s: float
    """Of a copy in its memory, read and written bytes together."""
    flops_per_s: float
    """Of a product of two large matrices, in the benchmark's dtype."""

    @property
    def facts(self) -> dict[str, float]:
        """For the report's environment."""
        rates = {"copy_gb_per_s": self.bytes_per_s / 1e9}
        return rates | {"matmul_tflop_per_s": self.flops_per_s / 1e12}


def measure_machine(device: str, dtype: torch.dtype) -> Machine:
    """Measure it, with as many CPU threads as torch uses; half a second, once a process."""
    return _measured(device, dtype, torch.get_num_threads())


@cache
def _measured(device: str, dtype: torch.dtype, threads: int) -> Machine:
    copied = _COPY_BYTES[device]
    x = torch.ones(copied, dtype=torch.uint8, device=device)  # written, so that it has own pages
    y = torch.ones_like(x)
    copy_s = _best_seconds(device, lambda: y.copy_(x))
    n = _MATMUL_SIZE[device]
    a = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    product_s = _best_seconds(device, lambda: torch.mm(a, a, out=out))
    return Machine(2 * copied / copy_s, 2 * n**3 / product_s)


@dataclass(frozen=True)
class Floor:
    """What a token, or an encoder's call, must move and compute (see the module)."""

    bytes: int
    flops: int

    def seconds(self, machine: Machine) -> float:
        """The longer of the two: moving and computing may overlap."""
        return max(self.bytes / machine.bytes_per_s, self.flops / machine.flops_per_s)

    def computes(self, machine: Machine) -> bool:
        """Whether it is computing that takes longer."""
        return self.flops / machine.flops_per_s > self.bytes / machine.bytes_per_s


def floor_of(model: Any, workload: AnyWorkload, kind: str) -> Floor:
    """The floor of a model as it is loaded: Hugging Face's, or a Fast one.

    Args:
        kind: ``seq2seq``, ``causal`` or ``encoder``.
    """
    if isinstance(workload, Encoding):
        return _encoder_floor(model, workload)
    return _token_floor(model, workload, kind)


def _token_floor(model: Any, workload: Workload, kind: str) -> Floor:
    source, head = kind == "seq2seq", model.get_output_embeddings().weight
    weights = _weights(model.get_decoder() if source else model.base_model, head)
    batch, rows, new = workload.batch, workload.batch * workload.beams, workload.new_tokens - 1
    sources = workload.prompt_tokens if source else 0
    prompt = 1 if source else workload.prompt_tokens
    # twice as many, as half a token is a token of every second step
    kept = 2 * prompt * (rows if source else batch) + rows * new + 2 * batch * sources
    seen = rows * (2 * prompt + new + 2 * sources)
    size, layer = head.element_size(), _layers(model.config, source) * _width(model.config)
    moved = weights.bytes + head.nbytes + rows * (weights.row_bytes + head.shape[0] * size)
    computed = 2 * rows * (weights.count + head.numel())
    return Floor(moved + kept * layer * size, computed + 2 * seen * layer)


def _encoder_floor(model: Any, workload: Encoding) -> Floor:
    pooler = getattr(model, "pooler", None)
    weights, pooled = _weights(model), 0 if pooler is None else _weights(pooler).count
    tokens, size = sum(workload.lengths), model.dtype.itemsize
    moved = weights.bytes + tokens * (weights.row_bytes + model.config.hidden_size * size)
    computed = 2 * tokens * (weights.count - pooled) + 2 * workload.batch * pooled
    pairs = sum(length**2 for length in workload.lengths)
    return Floor(moved, computed + 4 * pairs * _layers(model.config) * _width(model.config))


@dataclass
class _Weights:
    """What a step reads: all weights but tables, and a row of each table."""

    count: int = 0
    bytes: int = 0
    row_bytes: int = 0


def _weights(module: Any, head: torch.Tensor | None = None) -> _Weights:
    """Of a stack, without its head."""
    counted = None if head is None else head.data_ptr()
    tables = {
        table.weight.data_ptr(): table.weight[0].nbytes
        for table in module.modules()
        if isinstance(table, torch.nn.Embedding) and table.weight.data_ptr() != counted
    }
    found = _Weights(row_bytes=sum(tables.values()))
    for name, weight in module.named_parameters():
        elsewhere = weight.data_ptr() in tables or weight.data_ptr() == counted
        if not elsewhere and not _ONCE_A_CALL.search(name):
            found.count += weight.numel()
            found.bytes += weight.nbytes
    return found


def _layers(config: Any, decoder: bool = False) -> int:
    names = ("num_decoder_layers", "decoder_layers") if decoder else ()
    found = [getattr(config, name) for name in names if hasattr(config, name)]
    return int((found or [config.num_hidden_layers])[0])


def _width(config: Any) -> int:
    """Elements of a token's keys in one layer."""
    if hasattr(config, "d_kv"):  # T5, whose heads need not make up its width
        return int(config.num_heads * config.d_kv)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads * size)


def _best_seconds(device: str, work: Callable[[], Any]) -> float:
    """The shortest of several runs of ``work``."""
    best, begin, runs = math.inf, time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best
