"""The kernels of encoder.cu: their parameters, their launches, and what each of them computes.

A launch whose tensors are on the CPU, where nothing is compiled, is computed by torch: that is the
reference of its kernel, too.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import gelu, relu, silu

from fastgen.engines.fused.packed_values import (
    MAX_TERMS,
    THREADS,
    VECTOR,
    Buffer,
    Call,
    Norm,
    Size,
    Term,
    vector,
)
from fastgen.engines.nvrtc import Launch, PreparedLaunch, Program

_POINTER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_float, ctypes.c_int
_LONG = ctypes.c_longlong
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "RELU": relu,
    "GELU_TANH": partial(gelu, approximate="tanh"),
    "GELU_ERF": gelu,
    "SILU": silu,
}


class Kernel:
    """A launch of a kernel of our own, which may be of another source behind encoder.cu."""

    arguments: ctypes.Structure
    source = "encoder.cu"
    behind: Sequence[str] = ()
    """Sources that its own needs, beside those of all."""
    threads = THREADS
    overlaps = True
    """Whether it may start while the launch before it runs: it then waits for its inputs itself."""
    shared_bytes = 0
    alone = False
    """Whether a processor has one block of it, whose warps share out its registers themselves."""

    def __init__(self) -> None:
        self._prepared: PreparedLaunch | None = None

    @property
    def body(self) -> str:
        """The instantiation of its template."""
        raise NotImplementedError

    def prepare(self, program: Program, name: str) -> None:
        given = name, (1, 1), self.threads, self.arguments, self.shared_bytes
        launch = Launch(*given, overlaps=self.overlaps)
        self._prepared = program.prepare(launch)

    def launch(self, blocks: int) -> None:
        """Queue it over so many blocks, on torch's current stream."""
        assert self._prepared is not None
        self._prepared(torch.cuda.current_stream().cuda_stream, blocks)

    @property
    def on_gpu(self) -> bool:
        return self._prepared is not None


class OutArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("y", "values", "rest", "steps", "rest_steps")),
        ("factor", _FLOAT),
    ]


class LeavesRows(Kernel):
    """A kernel that leaves rows as they are, as 8-bit integers, or both: what somebody reads."""

    y: Buffer
    vector: int
    """Elements of one load."""

    @property
    def left(self) -> list[Buffer]:
        """What it writes of these."""
        rounded = self.y.rounded
        return [self.y] * self.y.plain + ([] if rounded is None else rounded.buffers)

    @property
    def store(self) -> str:
        if self.y.rounded is None:
            return "PLAIN"
        if self.y.rounded.rest is not None:
            return "SPLIT"
        return "BOTH" if self.y.plain else "ROUNDED"

    def _point(self, out: OutArgs) -> None:
        out.y = self.y.tensor.data_ptr() if self.y.plain else None
        if (rounded := self.y.rounded) is None:
            return
        out.values, out.factor = rounded.values.tensor.data_ptr(), 1 / (rounded.step or math.inf)
        if rounded.step is None:
            out.steps = rounded.steps.tensor.data_ptr()
        if rounded.rest is not None:
            out.rest = rounded.rest.values.tensor.data_ptr()
            out.rest_steps = rounded.rest.steps.tensor.data_ptr()

    def _leave(self, x: torch.Tensor) -> None:
        """Its reference, of the first rows in float32."""
        if self.y.plain:
            self.y.tensor[: len(x)] = x.to(self.y.tensor.dtype)
        if self.y.rounded is not None:
            self.y.rounded.fill(x)


class TermArgs(ctypes.Structure):
    _fields_ = [
        *(("table", _POINTER), ("ids", _POINTER)),
        *(("count", _INT), ("offset", _INT), ("one_id", _INT), ("scale", _FLOAT)),
    ]


class EmbedArgs(ctypes.Structure):
    _fields_ = [
        *(("term", TermArgs * MAX_TERMS), ("tokens", _POINTER), ("total", _POINTER)),
        *(("out", OutArgs), ("stream", _POINTER), ("weight", _POINTER), ("bias", _POINTER)),
        *(("eps", _FLOAT), ("sources", _INT)),
    ]


class Embed(LeavesRows):
    """A sum of embeddings, normed; of a root-mean-square norm the sum itself, too."""

    def __init__(
        self, terms: Sequence[Term], norm: Norm, y: Buffer, stream: Buffer | None = None
    ) -> None:
        """
        Args:
            stream: takes the sum in float32; what a root-mean-square norm needs.
        """
        super().__init__()
        self.terms, self.norm, self.y, self.stream = terms, norm, y, stream
        self.arguments = EmbedArgs(weight=norm.weight.data_ptr(), bias=pointer(norm.bias))
        self.arguments.eps = norm.eps
        self.vector = min(norm.vector, *(vector(term.table) for term in terms))
        self.threads = norm.threads(self.vector)
        for term, args in zip(terms, self.arguments.term, strict=False):
            args.table, args.count, args.offset = (
                term.table.data_ptr(),
                len(term.table),
                term.offset,
            )
            args.scale = term.scale

    @property
    def body(self) -> str:
        sizes = f"{self.y.width}, {self.vector}, {self.threads}"
        return f"embed<{sizes}, {len(self.terms)}, {self.norm.kind}, {self.store}>"

    @property
    def writes(self) -> Sequence[Buffer]:
        return self.left if self.stream is None else [*self.left, self.stream]

    def __call__(self, call: Call, size: Size) -> None:
        if not self.on_gpu:
            self.reference(call, size)
            return
        args = self.arguments
        for term, each in zip(self.terms, args.term, strict=False):
            each.ids = pointer(None if term.ids is None else call.ids[term.ids])
            each.one_id = term.ids is not None
        args.tokens = call.tokens.data_ptr()
        self._point(args.out)
        args.stream = None if self.stream is None else self.stream.tensor.data_ptr()
        args.total, args.sources = size.starts[-1:].data_ptr(), call.sources
        self.launch(len(call.tokens))

    def reference(self, call: Call, size: Size) -> None:
        tokens = call.tokens[: int(size.starts[-1])].long()
        total: Any = 0
        for term in self.terms:
            if term.ids is None:
                ids = tokens % call.sources
            else:
                given = call.ids[term.ids]
                ids = torch.zeros_like(tokens) if given is None else given.reshape(-1)[tokens]
            ids = (ids + term.offset).clamp(0, len(term.table) - 1)
            total = total + term.scale * term.table[ids].float()
        self._leave(self.norm(total))
        if self.stream is not None:
            self.stream.tensor[: len(tokens)] = total


class NormArguments(ctypes.Structure):
    _fields_ = [
        *(("x", _POINTER), ("residual", _POINTER), ("weight", _POINTER), ("bias", _POINTER)),
        *(("out", OutArgs), ("eps", _FLOAT)),
    ]


class NormRows(LeavesRows):
    """``norm(x + residual)``, a layer norm in float32."""

    def __init__(self, x: Buffer, residual: Buffer | None, norm: Norm, y: Buffer) -> None:
        super().__init__()
        self.x, self.residual, self.norm, self.y = x, residual, norm, y
        self.reads = [x] if residual is None else [x, residual]
        self.vector, self.threads = norm.vector, norm.threads(norm.vector)
        self.arguments = NormArguments(weight=norm.weight.data_ptr(), bias=pointer(norm.bias))
        self.arguments.eps = norm.eps

    @property
    def body(self) -> str:
        added = str(self.residual is not None).lower()
        sizes = f"{self.y.width}, {self.vector}, {self.threads}"
        return f"norm_rows<{sizes}, {added}, {self.store}>"

    @property
    def writes(self) -> Sequence[Buffer]:
        return self.left

    def __call__(self, size: Size) -> None:
        if not self.on_gpu:
            self.reference(size)
            return
        args = self.arguments
        args.x = self.x.tensor.data_ptr()
        self._point(args.out)
        args.residual = None if self.residual is None else self.residual.tensor.data_ptr()
        self.launch(size.tokens)

    def reference(self, size: Size) -> None:
        total = self.x.tensor[: size.tokens].float()
        if self.residual is not None:
            total = total + self.residual.tensor[: size.tokens].float()
        self._leave(self.norm(total))


class StreamArgs(ctypes.Structure):
    _fields_ = [("x", _POINTER), ("weight", _POINTER), ("out", OutArgs), ("eps", _FLOAT)]


class NormStream(LeavesRows):
    """The root-mean-square norm of a residual stream, which is float32."""

    def __init__(self, x: Buffer, norm: Norm, y: Buffer) -> None:
        super().__init__()
        self.x, self.norm, self.y = x, norm, y
        self.reads = [x]
        self.vector, self.threads = norm.vector, norm.threads(norm.vector)
        self.arguments = StreamArgs(weight=norm.weight.data_ptr(), eps=norm.eps)

    @property
    def body(self) -> str:
        return f"norm_stream<{self.y.width}, {self.vector}, {self.threads}, {self.store}>"

    @property
    def writes(self) -> Sequence[Buffer]:
        return self.left

    def __call__(self, size: Size) -> None:
        if not self.on_gpu:
            self.reference(size)
            return
        self.arguments.x = self.x.tensor.data_ptr()
        self._point(self.arguments.out)
        self.launch(size.tokens)

    def reference(self, size: Size) -> None:
        self._leave(self.norm(self.x.tensor[: size.tokens]))


class ActivationArgs(ctypes.Structure):
    _fields_ = [("x", _POINTER), ("gate", _POINTER), ("count", _LONG)]


class Activate(Kernel):
    """An activation in place, in float32, times a gate if there is one."""

    def __init__(self, x: Buffer, kind: str, gate: Buffer | None = None) -> None:
        super().__init__()
        self.x, self.kind, self.gate = x, kind, gate
        self.reads, self.writes = [x] if gate is None else [x, gate], ()
        self.arguments = ActivationArgs()
        self._vector = 1 if x.width % VECTOR else VECTOR

    @property
    def body(self) -> str:
        gated = str(self.gate is not None).lower()
        return f"activate_rows<{self.kind}, {self._vector}, {gated}>"

    def __call__(self, size: Size) -> None:
        if not self.on_gpu:
            self.reference(size)
            return
        args, count = self.arguments, size.tokens * self.x.width
        args.x, args.count = self.x.tensor.data_ptr(), count
        args.gate = None if self.gate is None else self.gate.tensor.data_ptr()
        self.launch(-(-count // (self.threads * self._vector)))

    def reference(self, size: Size) -> None:
        x = self.x.tensor[: size.tokens]
        y = ACTIVATIONS[self.kind](x.float())
        x.copy_(y if self.gate is None else y * self.gate.tensor[: size.tokens].float())


class PrefetchArgs(ctypes.Structure):
    _fields_ = [("from", _POINTER * 8), ("bytes", _LONG * 8), ("count", _INT)]


class Prefetch(Kernel):
    """Weights brought nearer to the processors; it computes nothing."""

    body = f"prefetch<{THREADS}>"
    overlaps = False
    _BLOCKS = 8  # enough for the memory's bandwidth, few enough to leave the processors to others

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._weights = weights[:8]
        self.arguments = PrefetchArgs(count=len(self._weights))
        for i, weight in enumerate(self._weights):
            getattr(self.arguments, "from")[i] = weight.data_ptr()
            self.arguments.bytes[i] = weight.nbytes

    def __call__(self) -> None:
        if self.on_gpu:
            self.launch(self._BLOCKS)


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
