"""The kernels of encoder.cu: their parameters, their launches, and what each of them computes.

A launch whose tensors are on the CPU, where nothing is compiled, is computed by torch: that is the
reference of its kernel, too.
"""

import ctypes
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
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "RELU": relu,
    "GELU_TANH": partial(gelu, approximate="tanh"),
    "GELU_ERF": gelu,
    "SILU": silu,
}


class Kernel:
    """A launch of a kernel of encoder.cu."""

    arguments: ctypes.Structure
    threads = THREADS
    overlaps = True
    """Whether it may start while the launch before it runs: it then waits for its inputs itself."""

    def __init__(self) -> None:
        self._prepared: PreparedLaunch | None = None

    @property
    def body(self) -> str:
        """The instantiation of its template."""
        raise NotImplementedError

    def prepare(self, program: Program, name: str) -> None:
        launch = Launch(name, (1, 1), self.threads, self.arguments, overlaps=self.overlaps)
        self._prepared = program.prepare(launch)

    def launch(self, blocks: int) -> None:
        """Queue it over so many blocks, on torch's current stream."""
        assert self._prepared is not None
        self._prepared(torch.cuda.current_stream().cuda_stream, blocks)

    @property
    def on_gpu(self) -> bool:
        return self._prepared is not None


class CountArgs(ctypes.Structure):
    _fields_ = [
        *(("mask", _POINTER), ("lengths", _POINTER), ("visible", _POINTER)),
        *(("sources", _INT), ("padding", _INT)),
    ]


class Count(Kernel):
    """How many tokens of each row are computed, and how many are visible."""

    body = f"count<{THREADS}>"

    def __init__(self) -> None:
        super().__init__()
        self.arguments = CountArgs()

    def __call__(self, call: Call) -> None:
        if not self.on_gpu:
            self.reference(call)
            return
        args = self.arguments
        args.mask, args.lengths = _pointer(call.mask), call.lengths.data_ptr()
        args.visible, args.sources = call.visible.data_ptr(), call.sources
        args.padding = call.padding
        self.launch(len(call.lengths))

    @staticmethod
    def reference(call: Call) -> None:
        seen = _seen(call)
        call.visible.copy_(seen.sum(1))
        if call.padding:
            call.lengths.fill_(call.sources)
        else:
            call.lengths.copy_(seen.sum(1) + ~seen[:, 0])


class PlaceArgs(ctypes.Structure):
    _fields_ = [
        *(("mask", _POINTER), ("lengths", _POINTER), ("visible", _POINTER)),
        *(("starts", _POINTER), ("keys", _POINTER), ("tokens", _POINTER), ("rows", _POINTER)),
        *(("sources", _INT), ("padding", _INT)),
    ]


class Place(Kernel):
    """Where each token lies, packed, and what attention must know of the rows."""

    body = f"place<{THREADS}>"

    def __init__(self) -> None:
        super().__init__()
        self.arguments = PlaceArgs()

    def __call__(self, call: Call, size: Size) -> None:
        if not self.on_gpu:
            self.reference(call, size)
            return
        args = self.arguments
        args.mask, args.lengths = _pointer(call.mask), call.lengths.data_ptr()
        args.visible, args.starts = call.visible.data_ptr(), size.starts.data_ptr()
        args.keys, args.tokens = size.keys.data_ptr(), call.tokens.data_ptr()
        args.rows, args.sources, args.padding = call.rows.data_ptr(), call.sources, call.padding
        self.launch(len(call.lengths))

    @staticmethod
    def reference(call: Call, size: Size) -> None:
        seen, (batch, sources) = _seen(call), call.rows.shape
        size.keys.copy_(call.visible)
        size.starts[0] = 0
        size.starts[1:].copy_(call.lengths.cumsum(0))
        kept = torch.ones_like(seen) if call.padding else seen.clone()
        kept[:, 0] = True
        order = torch.where(seen, 0, torch.where(kept, 1, 2)).argsort(dim=1, stable=True)
        places = order + sources * torch.arange(batch, device=order.device)[:, None]
        among = torch.arange(sources, device=order.device) < call.lengths[:, None]
        tokens = places[among]
        call.tokens[: len(tokens)] = tokens.to(torch.int32)
        call.rows.fill_(-1)
        numbers = torch.arange(len(tokens), dtype=torch.int32, device=order.device)
        call.rows.view(-1)[tokens] = numbers


class TermArgs(ctypes.Structure):
    _fields_ = [
        *(("table", _POINTER), ("ids", _POINTER)),
        *(("count", _INT), ("offset", _INT), ("one_id", _INT), ("scale", _FLOAT)),
    ]


class EmbedArgs(ctypes.Structure):
    _fields_ = [
        *(("term", TermArgs * MAX_TERMS), ("tokens", _POINTER), ("total", _POINTER)),
        *(("y", _POINTER), ("weight", _POINTER), ("bias", _POINTER)),
        *(("eps", _FLOAT), ("sources", _INT)),
    ]


class Embed(Kernel):
    """A sum of embeddings, normed."""

    def __init__(self, terms: Sequence[Term], norm: Norm, y: Buffer) -> None:
        super().__init__()
        self.terms, self.norm, self.y = terms, norm, y
        self.arguments = EmbedArgs(weight=norm.weight.data_ptr(), bias=norm.bias.data_ptr())
        self.arguments.eps = norm.eps
        self._vector = min(norm.vector, *(vector(term.table) for term in terms))
        self.threads = norm.threads(self._vector)
        for term, args in zip(terms, self.arguments.term, strict=False):
            args.table, args.count, args.offset = (
                term.table.data_ptr(),
                len(term.table),
                term.offset,
            )
            args.scale = term.scale

    @property
    def body(self) -> str:
        return f"embed<{self.y.width}, {self._vector}, {self.threads}, {len(self.terms)}>"

    def __call__(self, call: Call, size: Size) -> None:
        if not self.on_gpu:
            self.reference(call, size)
            return
        args = self.arguments
        for term, each in zip(self.terms, args.term, strict=False):
            each.ids = _pointer(None if term.ids is None else call.ids[term.ids])
            each.one_id = term.ids is not None
        args.tokens, args.y = call.tokens.data_ptr(), self.y.tensor.data_ptr()
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
        self.y.tensor[: len(tokens)] = self.norm(total).to(self.y.tensor.dtype)


class NormArguments(ctypes.Structure):
    _fields_ = [
        *(("x", _POINTER), ("residual", _POINTER), ("weight", _POINTER), ("bias", _POINTER)),
        *(("y", _POINTER), ("eps", _FLOAT)),
    ]


class NormRows(Kernel):
    """``norm(x + residual)``, in float32."""

    def __init__(self, x: Buffer, residual: Buffer | None, norm: Norm, y: Buffer) -> None:
        super().__init__()
        self.x, self.residual, self.norm, self.y = x, residual, norm, y
        self.reads = [x] if residual is None else [x, residual]
        self.writes = [y]
        self.threads = norm.threads(norm.vector)
        self.arguments = NormArguments(weight=norm.weight.data_ptr(), bias=norm.bias.data_ptr())
        self.arguments.eps = norm.eps

    @property
    def body(self) -> str:
        added = str(self.residual is not None).lower()
        return f"norm_rows<{self.y.width}, {self.norm.vector}, {self.threads}, {added}>"

    def __call__(self, size: Size) -> None:
        if not self.on_gpu:
            self.reference(size)
            return
        args = self.arguments
        args.x, args.y = self.x.tensor.data_ptr(), self.y.tensor.data_ptr()
        args.residual = None if self.residual is None else self.residual.tensor.data_ptr()
        self.launch(size.tokens)

    def reference(self, size: Size) -> None:
        total = self.x.tensor[: size.tokens].float()
        if self.residual is not None:
            total = total + self.residual.tensor[: size.tokens].float()
        self.y.tensor[: size.tokens] = self.norm(total).to(self.y.tensor.dtype)


class ActivationArgs(ctypes.Structure):
    _fields_ = [("x", _POINTER), ("count", _LONG)]


class Activate(Kernel):
    """An activation in place, in float32."""

    def __init__(self, x: Buffer, kind: str) -> None:
        super().__init__()
        self.x, self.kind = x, kind
        self.reads, self.writes = (x,), ()
        self.arguments = ActivationArgs()
        self._vector = 1 if x.width % VECTOR else VECTOR

    @property
    def body(self) -> str:
        return f"activate_rows<{self.kind}, {self._vector}>"

    def __call__(self, size: Size) -> None:
        if not self.on_gpu:
            self.reference(size)
            return
        args, count = self.arguments, size.tokens * self.x.width
        args.x, args.count = self.x.tensor.data_ptr(), count
        self.launch(-(-count // (self.threads * self._vector)))

    def reference(self, size: Size) -> None:
        x = self.x.tensor[: size.tokens]
        x.copy_(_ACTIVATIONS[self.kind](x.float()))


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


class SpreadArgs(ctypes.Structure):
    _fields_ = [("x", _POINTER), ("rows", _POINTER), ("y", _POINTER)]


class Spread(Kernel):
    """Packed rows back to [B, S, E], zeros where nothing was computed."""

    def __init__(self, x: Buffer) -> None:
        super().__init__()
        self.x, self.arguments = x, SpreadArgs()
        self._vector = 1 if x.width % VECTOR else VECTOR
        self.threads = min(THREADS, -(-x.width // (32 * self._vector)) * 32)

    @property
    def body(self) -> str:
        return f"spread<{self.x.width}, {self._vector}, {self.threads}>"

    def __call__(self, call: Call) -> None:
        if not self.on_gpu:
            self.reference(call)
            return
        args = self.arguments
        args.x, args.y = self.x.tensor.data_ptr(), call.hidden.data_ptr()
        args.rows = call.rows.data_ptr()
        self.launch(call.rows.numel())

    def reference(self, call: Call) -> None:
        computed = (call.rows >= 0)[..., None]
        call.hidden.copy_(torch.where(computed, self.x.tensor[call.rows.clamp(min=0).long()], 0))


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _seen(call: Call) -> torch.Tensor:
    if call.mask is None:
        return torch.ones_like(call.rows, dtype=torch.bool)
    return call.mask != 0
