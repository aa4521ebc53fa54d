"""What follows a decoder step on a GPU, as one CUDA kernel instead of many small ones of torch.

The torch code in ``choose.py`` and ``advance.py`` is the slow reference; the kernels give its
results bit for bit, and it serves whatever they do not.
"""

import ctypes
from collections.abc import Callable
from functools import cache, cached_property
from importlib.resources import files

import torch

from fastgen.engines import nvrtc
from fastgen.engines.nvrtc import Launch, PreparedLaunch, Program
from fastgen.execution.bucket import Bucket
from fastgen.generation.state import BeamState, SampleState
from fastgen.options import EngineOptions

# As in greedy.cu, beams.cu and top.cu
MAX_ENDS = 32
MAX_BEAMS = 16
MAX_CANDIDATES = 256
MAX_SELECTED = 32

_GREEDY_THREADS = 256
_SELECT_THREADS = 512
_SHARE = 4096  # of a row's vocabulary, what one block looks through
_MAX_SHARES = 32  # blocks of one row
_TILE_BYTES = 40 * 1024  # shared memory for token tables; with static arrays within 48 KB
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


def _fields(pointers: str, numbers: str) -> list[tuple[str, type]]:
    return [(n, _POINTER) for n in pointers.split()] + [(n, _INT) for n in numbers.split()]


class GreedyArgs(ctypes.Structure):
    _fields_ = _fields(
        "logits pad eos sequences index input_ids position first_slot unfinished seen best arrived",
        "rows vocabulary capacity ends pads stops",
    )


class BeamArgs(ctypes.Structure):
    _fields_ = _fields(
        "top indices limit eos final_divisor best_divisor running sequences ancestors "
        "running_parents parents running_scores scores finished improvable index count steps "
        "done seen input_ids positions first_slot slot_mask prefix arrived",
        "vocabulary beams candidates capacity slots ends early",
    )


class SelectArgs(ctypes.Structure):
    _fields_ = _fields("log_probs running_scores kept arrived top indices", "vocabulary beams k")


class TopArgs(ctypes.Structure):
    _fields_ = _fields("items places", "count k")


@cache
def program(name: str, dtype: torch.dtype, device: torch.device) -> Program:
    """``greedy`` or ``beams``, compiled for logits of a dtype."""
    parts = ("select", "greedy") if name == "greedy" else ("select", "top", "beams")
    sources = [(files("fastgen.generation") / f"{part}.cu").read_text() for part in parts]
    return nvrtc.program("\n".join([f"#define T {nvrtc.ELEMENTS[dtype]}", *sources]), device)


def _obstacle(bucket: Bucket, options: EngineOptions, ends: int) -> str | None:
    """Why no kernel serves this bucket; None if one can."""
    if not options.fused_kernels:
        return "EngineOptions.fused_kernels=False"
    if bucket.device.type != "cuda":
        return "kernels need a GPU"
    if bucket.dtype not in nvrtc.ELEMENTS or bucket.target.appends_in_attention:
        return f"kernels do not serve {bucket.dtype} on this Target"
    if ends > MAX_ENDS:
        return f"{ends} end-of-sequence tokens: kernels serve {MAX_ENDS}"
    return _machine_obstacle(bucket.device)


_machine_obstacle = cache(nvrtc.refusal)


def greedy_obstacle(state: SampleState, bucket: Bucket, options: EngineOptions) -> str | None:
    """Why ``GreedyTail`` cannot serve this batch; None if it can."""
    if bucket.size.batch > _GREEDY_THREADS:
        return f"{bucket.size.batch} rows: the kernel serves {_GREEDY_THREADS}"
    return _obstacle(bucket, options, state.eos.numel())


def beam_obstacle(
    state: BeamState, bucket: Bucket, options: EngineOptions, candidates: int
) -> str | None:
    """Why ``BeamTail`` cannot serve these beams; None if it can."""
    if state.beams > MAX_BEAMS or candidates > MAX_CANDIDATES:
        return f"{state.beams} beams, {candidates} candidates: more than the kernel serves"
    obstacle = _obstacle(bucket, options, state.eos.numel())
    if obstacle is None and not _orders_ties_as_torch(bucket.dtype, bucket.device):
        return "this version of torch orders equal scores differently"
    return obstacle


class _Tail:
    """A kernel that is prepared on first use and launched on torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launch: PreparedLaunch | None = None
        self._tensors: list[torch.Tensor] = []  # a launch holds only pointers

    def _address(self, tensor: torch.Tensor, dtype: torch.dtype = torch.int64) -> int:
        """Where a contiguous tensor starts. Pinned host memory has one address for host and GPU."""
        assert tensor.is_contiguous() and tensor.dtype == dtype, (tensor.shape, tensor.dtype)
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def _scratch(self, count: int) -> int:
        return self._address(torch.zeros(count, dtype=torch.int64, device=self._device))

    def _queue(self, prepare: Callable[[], PreparedLaunch]) -> None:
        if self._launch is None:
            self._launch = prepare()
        with torch.cuda.device(self._device):
            self._launch(torch.cuda.current_stream(self._device).cuda_stream)


class GreedyTail(_Tail):
    """All that ``Choose`` does for a greedy token without processors."""

    def __init__(self, state: SampleState, bucket: Bucket, pads: bool, stops: bool) -> None:
        """
        Args:
            pads: finished rows continue with ``state.pad``.
            stops: a token of ``state.eos`` finishes its row.
        """
        super().__init__(bucket.device)
        self._state, self._bucket, self._pads, self._stops = state, bucket, pads, stops

    def __call__(self) -> None:
        self._queue(self._prepare)

    def _prepare(self) -> PreparedLaunch:
        state, bucket, address = self._state, self._bucket, self._address
        tensors, logits = bucket.tensors, bucket.tensors["logits"]
        rows, vocabulary = bucket.size.batch, logits.shape[-1]
        shares = min(-(-vocabulary // _SHARE), _MAX_SHARES)
        arguments = GreedyArgs(
            logits=address(logits, bucket.dtype),
            pad=address(state.pad),
            eos=address(state.eos),
            sequences=address(state.sequences),
            index=address(state.index),
            input_ids=address(tensors["input_ids"]),
            position=address(tensors["query_positions"]),
            first_slot=address(tensors["first_slot"]),
            unfinished=address(state.unfinished, torch.bool),
            seen=address(state.seen, torch.bool),
            best=self._scratch(rows * shares),
            arrived=self._scratch(1),
            rows=rows,
            vocabulary=vocabulary,
            capacity=state.sequences.shape[1],
            ends=state.eos.numel(),
            pads=self._pads,
            stops=self._stops,
        )
        kernels = program("greedy", bucket.dtype, bucket.device)
        return kernels.prepare(Launch("greedy", (shares, rows), _GREEDY_THREADS, arguments))


class Selection(_Tail):
    """``torch.topk`` over all continuations of each row's beams."""

    def __init__(
        self,
        running_scores: torch.Tensor,
        vocabulary: int,
        k: int,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            running_scores: float32 [B, N].
            k: how many continuations of a row to keep.
            dtype: of the program whose kernel this is.
        """
        super().__init__(running_scores.device)
        (batch, beams), device = running_scores.shape, running_scores.device
        self.top = torch.empty(batch, k, dtype=torch.float32, device=device)
        self.indices = torch.empty(batch, k, dtype=torch.int64, device=device)
        shares = -(-vocabulary // _SHARE)
        self._grid, self._dtype = (shares, batch * beams), dtype
        self._arguments = SelectArgs(
            running_scores=self._address(running_scores, torch.float32),
            kept=self._scratch(batch * beams * shares * k),
            arrived=self._scratch(batch),
            top=self.top.data_ptr(),
            indices=self.indices.data_ptr(),
            vocabulary=vocabulary,
            beams=beams,
            k=k,
        )

    def __call__(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and places in N * V, [B, k], of the best of float32 [B * N, V]; overwritten by
        the next call."""
        self._log_probs = log_probs.contiguous()  # a captured graph reads it again
        self._arguments.log_probs = self._log_probs.data_ptr()
        self._queue(self._prepare)
        return self.top, self.indices

    def _prepare(self) -> PreparedLaunch:
        launch = Launch("select_best", self._grid, _SELECT_THREADS, self._arguments)
        return program("beams", self._dtype, self._device).prepare(launch)


@cache
def selects_as_torch(
    batch: int, beams: int, vocabulary: int, k: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether ``Selection`` serves rows of this size, with the order that equal scores have in
    torch's topk, which promises none."""
    if k > MAX_SELECTED or beams * vocabulary >= 2**31 or batch * beams >= 2**16:
        return False
    generator = torch.Generator(device).manual_seed(0)
    shape, scores = (batch * beams, vocabulary), torch.zeros(batch, beams, device=device)
    high = max(1, beams * vocabulary // 4)  # about four of each value
    items = torch.randint(high, shape, generator=generator, device=device, dtype=torch.float32)
    expected = torch.topk(items.view(batch, -1), k)[1]
    return torch.equal(Selection(scores, vocabulary, k, dtype)(items)[1], expected)


class BeamTail(_Tail):
    """All that ``Advance`` does with the best candidates."""

    def __init__(self, state: BeamState, bucket: Bucket, candidates: int, early: bool) -> None:
        """
        Args:
            candidates: C, how many continuations of a row there are.
            early: a row is done as soon as all its beams have finished.
        """
        super().__init__(bucket.device)
        self._state, self._bucket = state, bucket
        self._candidates, self._early = candidates, early

    @cached_property
    def select(self) -> Selection | None:
        """What serves for torch.topk, if it can. First asked for outside a capture."""
        scores, dtype = self._state.running_scores, self._bucket.dtype
        vocabulary, k = self._bucket.tensors["logits"].shape[-1], self._candidates
        if not selects_as_torch(*scores.shape, vocabulary, k, dtype, scores.device):
            return None
        return Selection(scores, vocabulary, k, dtype)

    def __call__(self, top: torch.Tensor, indices: torch.Tensor) -> None:
        """
        Args:
            top: [B, C] scores of the best continuations.
            indices: [B, C] each one's beam * vocabulary + token.
        """
        self._top = top.contiguous(), indices.contiguous()  # a captured graph reads them again
        self._arguments.top, self._arguments.indices = (t.data_ptr() for t in self._top)
        self._queue(self._prepare)

    @cached_property
    def _arguments(self) -> BeamArgs:
        state, bucket, address = self._state, self._bucket, self._address
        tensors, floats, flags = bucket.tensors, torch.float32, torch.bool
        names = "limit eos running sequences ancestors index steps"
        return BeamArgs(
            **{name: address(getattr(state, name)) for name in names.split()},
            **{n: address(tensors[n]) for n in ("input_ids", "first_slot")},
            **{n: address(getattr(state, n), flags) for n in ("finished", "improvable")},
            **{n: address(getattr(state, n), flags) for n in ("done", "seen")},
            **{n: address(getattr(state, n), floats) for n in ("running_scores", "scores")},
            **{n: address(getattr(state, n), floats) for n in ("final_divisor", "best_divisor")},
            **{n: address(getattr(state, n), torch.int32) for n in ("running_parents", "parents")},
            count=address(state.new),
            positions=address(tensors["query_positions"]),
            slot_mask=address(tensors["slot_mask"], bucket.dtype),
            prefix=address(bucket.prefix_slots),
            arrived=self._scratch(1),
            vocabulary=tensors["logits"].shape[-1],
            beams=state.beams,
            candidates=self._candidates,
            capacity=state.capacity,
            slots=bucket.size.slots,
            ends=state.eos.numel(),
            early=self._early,
        )

    def _prepare(self) -> PreparedLaunch:
        state, bucket = self._state, self._bucket
        columns = 64
        while columns < min(state.capacity, 256) and 40 * state.beams * columns <= _TILE_BYTES:
            columns *= 2
        shared = 20 * state.beams * columns  # five tables of int
        launch = Launch("advance", (state.batch, 1), 3 * columns, self._arguments, shared)
        return program("beams", bucket.dtype, bucket.device).prepare(launch)


def top_places(items: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """``torch.topk(items, k)[1]`` for float32 [rows, at most 256], by the kernel's own rule."""
    places = torch.empty(items.shape[0], k, dtype=torch.int64, device=items.device)
    arguments = TopArgs(items.data_ptr(), places.data_ptr(), items.shape[1], k)
    launch = Launch("top_rows", (items.shape[0], 1), 32, arguments)
    stream = torch.cuda.current_stream(items.device).cuda_stream
    with torch.cuda.device(items.device):
        program("beams", dtype, items.device).prepare(launch)(stream)
    return places


@cache
def _orders_ties_as_torch(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel picks and orders equal scores as torch's topk, which promises no order."""
    generator = torch.Generator().manual_seed(0)
    for k, count in ((2, 6), (4, 12), (5, 10), (8, 24), (16, 64)):
        values = torch.randint(4, (32, count), generator=generator).float().to(device)
        if not torch.equal(top_places(values, k, dtype), torch.topk(values, k)[1]):
            return False
    return True
