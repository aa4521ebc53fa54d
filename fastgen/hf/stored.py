"""Weights of fewer bits on disk: a graph's are made once, and mapped by every later start.

They are a file of the engine cache, in the safetensors format, whose tensors have the graph's names
for them. Its key names what each parameter holds by a digest of all its bytes: other numbers are
another file, wherever they come from. Scales lie before values, as a session keeps them.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from fastgen import blockwise, processes
from fastgen.blockwise import Blocks
from fastgen.engine_cache import EngineCache
from fastgen.fingerprint import digest
from fastgen.hf.let_go import Gone
from fastgen.hf.quantised import Key, Weights, blocks_of

_ALIGNED = 64  # bytes that the header is a multiple of
_DTYPES = {
    torch.uint8: "U8",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}


def recall(weights: Weights, names: Iterable[str], kept: EngineCache, title: str) -> None:
    """Give ``weights`` what these names of a graph stand for, mapped from disk; what is not there
    yet is made and left there. Where the disk cannot hold it, nothing is given.

    Args:
        names: those of parameters as they are are passed over.
        title: what ``fastgen cache list`` shows.

    Raises:
        NoEngine: a parameter has no such form; nothing is left then.
    """
    keys = weights.unmade(names)
    if not keys or any(isinstance(weights.parameter(name), Gone) for name, _ in keys):
        return

    def write(file: BinaryIO) -> None:
        _write(file, weights, keys)

    path = kept.file(_key(weights, keys), write, title=title)
    # Somebody may have removed it meanwhile
    with contextlib.suppress(OSError, SafetensorError):
        if path is not None:
            for key, blocks in _read(path, keys).items():
                weights.give(key, blocks)


def _key(weights: Weights, keys: Iterable[Key]) -> dict[str, Any]:
    """Everything that changes the file: what is made of which numbers, and how."""
    made: dict[str, list[str]] = {}
    for name, form in keys:
        made.setdefault(name, []).append(form.names(name)[0])
    with ThreadPoolExecutor(processes.threads()) as threads:  # a matrix may be one piece to digest
        contents = [*threads.map(_contents, map(weights.parameter, made))]
    of = {n: [sorted(made[n]), *held] for n, held in zip(made, contents, strict=True)}
    return {"weights": of, "sources": _sources_digest()}


def _contents(parameter: torch.Tensor) -> tuple[str, list[int], str]:
    """Dtype, shape and a digest of the numbers."""
    data = parameter.detach().contiguous().flatten().view(torch.uint8).numpy().data
    dtype = str(parameter.dtype).removeprefix("torch.")
    return dtype, list(parameter.shape), digest(data).hex()


@cache
def _sources_digest() -> str:
    """Digest of the code that makes blocks: when it changes, so may they."""
    return hashlib.sha256(Path(blockwise.__file__).read_bytes()).hexdigest()


def _write(file: BinaryIO, weights: Weights, keys: list[Key]) -> None:
    """Make blocks one after the other, and write each where the header says."""
    places, start = _header(file, weights, keys)
    for name, form in keys:
        blocks = blocks_of(weights.computed_with(name), name, form)
        parts = zip(form.names(name), (blocks.values, blocks.scales), strict=True)
        for part, tensor in parts:
            file.seek(start + places[part])
            file.write(tensor.cpu().flatten().view(torch.uint8).numpy().data)


def _header(file: BinaryIO, weights: Weights, keys: list[Key]) -> tuple[dict[str, int], int]:
    """Write it; gives where each tensor begins behind it, and its own size, in bytes."""
    values, scales = [], []
    for name, form in keys:
        computed, sizes = weights.type_of(name)
        outputs, inputs = sizes[:: -1 if form.transposed else 1]
        dtypes = form.dtypes(getattr(torch, computed))
        parts = zip(form.names(name), dtypes, form.shapes(outputs, inputs), strict=True)
        values.append(next(parts))
        scales.append(next(parts))
    header, places, end = {}, dict[str, int](), 0
    for part, dtype, shape in [*scales, *values]:
        places[part], end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [places[part], end]
        header[part] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    file.write(len(text).to_bytes(8, "little") + text)
    return places, len(text) + 8


def _read(path: Path, keys: Iterable[Key]) -> dict[Key, Blocks]:
    """Blocks whose memory is the file's. Values and scales are mapped apart, so that the ones can
    go while the others stay."""
    with safe_open(path, "pt") as values, safe_open(path, "pt") as scales:
        found = {}
        for name, form in keys:
            names = form.names(name)
            parts = values.get_tensor(names[0]), scales.get_tensor(names[1])
            found[name, form] = Blocks(*parts, form.kind)
    return found
