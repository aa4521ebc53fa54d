"""The kernels that pack tokens and spread them again: where each of them lies, in both."""

import ctypes

import torch

from fastgen.engines.fused.packed_kernels import Kernel, pointer
from fastgen.engines.fused.packed_values import THREADS, VECTOR, Buffer, Call, Size

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


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
        args.mask, args.lengths = pointer(call.mask), call.lengths.data_ptr()
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
        *(("columns", _POINTER), ("sources", _INT), ("padding", _INT)),
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
        args.mask, args.lengths = pointer(call.mask), call.lengths.data_ptr()
        args.visible, args.starts = call.visible.data_ptr(), size.starts.data_ptr()
        args.keys, args.tokens = size.keys.data_ptr(), call.tokens.data_ptr()
        args.rows, args.sources, args.padding = call.rows.data_ptr(), call.sources, call.padding
        args.columns = pointer(size.columns)
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
        if size.columns is not None:
            size.columns[: len(tokens)] = (tokens % sources).to(torch.int32)
        call.rows.fill_(-1)
        numbers = torch.arange(len(tokens), dtype=torch.int32, device=order.device)
        call.rows.view(-1)[tokens] = numbers


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


def _seen(call: Call) -> torch.Tensor:
    if call.mask is None:
        return torch.ones_like(call.rows, dtype=torch.bool)
    return call.mask != 0
