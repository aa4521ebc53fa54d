"""Attention of many rows and over long KV buffers, against the same in float64."""

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fastgen.engines import nvrtc
from fastgen.engines.fused import ops as fused_ops
from fastgen.engines.fused.engine import FusedBinding
from fastgen.engines.fused.rotary import Turn
from fastgen.engines.fused.values import TurnArgs, pointer
from fastgen.engines.fused.wide import WideOps
from fastgen.target import onnxruntime_cuda
from tests.gpu.test_fused import error

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda", 0)
HIDDEN = float("-inf")


@dataclass(frozen=True)
class Case:
    """Attention of ``batch`` rows of ``queries`` tokens, behind ``filled`` slots; without these
    over all slots of a source, of which the last row sees half."""

    head_size: int
    batch: int
    queries: int
    heads: int
    slots: int
    filled: int | None = None
    group: int = 1
    prefix: int = 0
    """Slots that all queries of a row share; behind them each sees one of every ``queries``."""
    turn: str = "AS_IS"
    table: bool = False
    padded: bool = False
    """Whether rows begin at other slots than the first."""
    sizes: tuple[int, ...] = ()
    """Splits, warps and stages, if not those that are chosen."""


CASES = {
    "GPT-2": Case(64, 16, 1, 12, 1024, 544, padded=True),
    "one token": Case(64, 16, 1, 2, 64, 0),
    "the last slot": Case(64, 16, 1, 2, 64, 63),
    "four warps of three tiles": Case(64, 16, 1, 4, 256, 180, sizes=(1, 4, 2)),
    "eight blocks a row": Case(64, 16, 1, 1, 1024, 1001, sizes=(8, 4, 3)),
    "more blocks than slots": Case(64, 16, 1, 1, 512, 5, sizes=(8, 4, 2)),
    "long": Case(64, 16, 1, 1, 8192, 8000),
    "long, one block": Case(64, 16, 1, 2, 4096, 3333, sizes=(1, 4, 2)),
    "T5": Case(64, 16, 1, 16, 64, 40, table=True),
    "heads of 16": Case(16, 16, 1, 4, 128, 100, table=True),
    "heads of 80": Case(80, 16, 1, 3, 512, 300, padded=True),
    "heads of 128": Case(128, 16, 1, 4, 512, 300),
    "a source": Case(64, 16, 1, 16, 512),
    "a source of four beams": Case(64, 16, 4, 16, 512),
    "a source of six beams": Case(48, 8, 6, 3, 80),
    "a source of twelve beams": Case(128, 3, 12, 2, 200),
    "a long source": Case(64, 4, 4, 2, 1280, sizes=(1, 4, 2)),
    "beams": Case(64, 16, 4, 3, 512, 300),
    "three beams, a table": Case(64, 6, 3, 4, 384, 300, table=True),
    "twelve beams": Case(96, 1, 12, 2, 384, 240),
    "beams behind a prompt": Case(64, 16, 4, 4, 4096, 640, prefix=512),
    "beams, long": Case(64, 3, 4, 2, 4096, 2500, sizes=(2, 4, 2)),
    "groups": Case(64, 16, 1, 32, 512, 301, group=4, turn="TURNED", padded=True),
    "groups of seven, normed": Case(128, 16, 1, 14, 512, 301, group=7, turn="NORMED"),
    "groups of sixteen": Case(64, 16, 1, 16, 128, 99, group=16),
    "beams of groups": Case(64, 4, 4, 8, 512, 301, group=2, turn="NORMED"),
}


class Attention:
    """A case's tensors on the GPU."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        torch.manual_seed(0)
        batch, queries, slots = case.batch, case.queries, case.slots
        kept = case.heads // case.group * case.head_size
        own = 0 if case.filled is None else 2 * kept
        self.q = self._noise(batch * queries, case.heads * case.head_size + own)
        self.key, self.value = self._noise(batch, slots, kept), self._noise(batch, slots, kept)
        places = torch.arange(slots, device=DEVICE)
        behind = (places - case.prefix) // queries
        self.slot_positions = torch.where(places < case.prefix, places, case.prefix + behind)
        self.row_start = None
        self.table, self.reach = self._noise(case.heads, 22) if case.table else None, 20
        if self.table is not None:
            self.table[:, 1] = HIDDEN
        if case.filled is None:
            self.filled = slots
            self.mask: Any = torch.zeros(batch, 1, queries, slots, dtype=dtype, device=DEVICE)
            self.mask[-1, ..., slots // 2 :] = torch.finfo(dtype).min / 2
            return
        self.filled = case.filled
        self.now = int(self.slot_positions[case.filled])
        self.mask = self._of_beams() if queries > 1 else None
        if case.padded:
            self.row_start = (3 * torch.arange(batch, device=DEVICE)).clamp(max=self.now)
        self.angles = torch.randn(slots, case.head_size // 2, 2, device=DEVICE)
        self.norms = self._noise(2, case.head_size)

    def _noise(self, *axes: int) -> torch.Tensor:
        return torch.randn(axes, device=DEVICE, dtype=self.dtype)

    def _of_beams(self) -> torch.Tensor:
        case = self.case
        count = case.slots // case.queries + 1
        chosen = torch.randint(0, case.queries, (case.batch, 1, case.queries, count), device=DEVICE)
        chosen[..., self.now - case.prefix] = torch.arange(case.queries, device=DEVICE)
        seen = torch.nn.functional.one_hot(chosen, case.queries).flatten(-2) > 0
        seen = torch.nn.functional.pad(seen, (case.prefix, 0), value=True)[..., : case.slots]
        return torch.where(seen, 0.0, HIDDEN).to(self.dtype)

    def run(self) -> torch.Tensor:
        """By a kernel; new keys and values go to the buffers."""
        case = self.case
        ids = torch.zeros(case.batch, case.queries, dtype=torch.int64, device=DEVICE)
        target = onnxruntime_cuda(str(self.dtype).removeprefix("torch."))
        ops = WideOps(target, {}, {"input_ids": ids})
        more: dict[str, Any] = {}
        if case.filled is not None:
            self.first_slot = torch.full((case.batch,), case.filled, device=DEVICE)
            self.query_positions = torch.full((case.queries,), self.now, device=DEVICE)
            for name in ("query_positions", "slot_positions", "first_slot", "row_start", "table"):
                more[name] = pointer(getattr(self, name))
            turned = TurnArgs(self.angles.data_ptr(), known=case.slots, eps=1e-5)
            turned.query_norm, turned.key_norm = (x.data_ptr() for x in self.norms)
            more |= {"span": 22, "reach": self.reach, "turn": Turn(case.turn, turned)}
        shape = self.q, self.key, self.value, case.heads
        y = ops._attention(*shape, case.group, mask=pointer(self.mask), scale=0.125, **more)
        self.kernel = ops._kernels[-1]
        FusedBinding(ops, nvrtc.program(ops.source(), DEVICE)).run()
        return y

    def expected(self) -> torch.Tensor:
        """In float64; new keys and values go to copies of the buffers."""
        case, wide = self.case, torch.float64
        rows, width = case.batch, case.heads * case.head_size
        split = self.q.to(wide).view(rows, case.queries, -1, case.head_size)
        q, end = split[:, :, : case.heads], self.filled
        key, value = (
            x.to(wide).view(rows, case.slots, -1, case.head_size) for x in (self.key, self.value)
        )
        if case.filled is not None:
            k, v = split[:, :, case.heads :].chunk(2, dim=2)
            q, k = self._turned(q, 0), self._turned(k, 1).to(self.dtype).to(wide)
            end = case.filled + case.queries
            key[:, case.filled : end], value[:, case.filled : end] = k, v
        self.stored = key.flatten(2), value.flatten(2)
        key, value = (x[:, :end].repeat_interleave(case.group, 2) for x in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, key) * 0.125 + self._bias()[..., :end]
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
        return attended.reshape(rows * case.queries, width)

    def _bias(self) -> torch.Tensor:
        bias = 0.0 if self.mask is None else self.mask.double()
        if self.case.filled is None:
            return bias  # type: ignore[return-value]
        ahead = self.slot_positions - self.now
        if self.table is not None:
            return bias + self.table.double()[:, ahead.clamp(-self.reach, 1)][:, None]
        hidden = (ahead > 0)[None, None, None]
        if self.row_start is not None:
            hidden = hidden | (self.slot_positions < self.row_start[:, None, None, None])
        return bias + torch.where(hidden, HIDDEN, 0.0).double()

    def _turned(self, x: torch.Tensor, norm: int) -> torch.Tensor:
        if self.case.turn == "AS_IS":
            return x
        if self.case.turn == "NORMED":
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
            x = x * self.norms[norm].double()
        start = 0 if self.row_start is None else self.row_start
        place = torch.zeros(self.case.batch, device=DEVICE, dtype=torch.int64) + self.now - start
        cosine, sine = self.angles[place].double()[:, None, None].unbind(-1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_its_result_can_be(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within little more than the rounding of what it gives; and it stores what is new, reads
    nothing behind it, and leaves all else alone."""
    case = CASES[name]
    if case.sizes or case.batch * case.queries <= 16:
        sizes = case.sizes or (1, 8, 2)
        given = dict(zip(("splits", "warps", "stages"), sizes, strict=True))
        monkeypatch.setattr(fused_ops, "choose", lambda dtype, wide, *rest: replace(wide, **given))
    attention = Attention(case, dtype)
    exact = attention.expected()
    buffers = attention.key, attention.value
    for buffer in buffers:
        buffer[:, attention.filled :] = float("nan")
    found = attention.run()
    assert "wide_attention<" in attention.kernel
    rounded = error(exact.to(dtype), exact)
    assert error(found, exact) <= 1.25 * rounded + 2e-6
    end = attention.filled + (0 if case.filled is None else case.queries)
    for buffer, stored in zip(buffers, attention.stored, strict=True):
        assert torch.equal(buffer[:, : attention.filled], stored[:, : attention.filled].to(dtype))
        torch.testing.assert_close(buffer[:, :end].double(), stored[:, :end], atol=0.02, rtol=0.02)
        assert buffer[:, end:].isnan().all()


class Out(ctypes.Structure):
    _fields_ = [("y", ctypes.c_void_p)]


def test_a_launch_that_needs_less_shared_memory_takes_none_from_another() -> None:
    source = """
        struct Out { float* y; };
        extern "C" __global__ void last(const __grid_constant__ Out out) {
            extern __shared__ float held[];
            held[threadIdx.x] = threadIdx.x;
            out.y[threadIdx.x] = held[threadIdx.x];
        }"""
    y, program = torch.zeros(32, device=DEVICE), nvrtc.program(source, DEVICE)
    sizes = [80 * 1024, 64 * 1024]
    first, _ = (
        program.prepare(nvrtc.Launch("last", (1, 1), 32, Out(y.data_ptr()), shared_bytes=size))
        for size in sizes
    )
    first(torch.cuda.current_stream(DEVICE).cuda_stream)
    assert y.tolist() == list(range(32))
