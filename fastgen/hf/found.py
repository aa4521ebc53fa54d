"""What was found to need float32 in float16 models, remembered by the weights it was found with.

Found once a set of weights, in whatever dtype they were: a file beside the engine cache's entries
names them by sums of their float16 bits. Other weights, those after training say, are not found.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastgen.engine_cache import EngineCache
from fastgen.engines.side_file import SideFile
from fastgen.fingerprint import fingerprint
from fastgen.hf.weights import tensors_of
from fastgen.ops import names

_here: dict[str, dict[str, list[str]]] = {}
"""What this process has found, by the same two names as files and their entries have."""


def remember(module: Any, wide: Sequence[str]) -> None:
    """Keep the names that were found for a module's graphs (see ``Target.wide``)."""
    shapes, entry = _shapes(module), {_weights(tensors_of(module)): [*wide]}
    file = _file(module, shapes)
    _here.setdefault(shapes, {}).update(entry)
    file.write(json.dumps(_kept(file) | entry).encode())


def recalled(module: Any) -> tuple[str, ...] | None:
    """What was found for the weights that a module has now; None if nothing was looked for."""
    shapes = _shapes(module)
    known = _kept(_file(module, shapes)) | _here.get(shapes, {})
    found = known.get(_weights(tensors_of(module))) if known else None
    return None if found is None else tuple(found)


def _file(module: Any, shapes: str) -> SideFile:
    options = module.engine_options
    folder = EngineCache(options.cache_dir).folder if options.disk_cache else None
    return SideFile(folder, f"{shapes}.float16")


def _kept(file: SideFile) -> dict[str, list[str]]:
    try:
        kept: dict[str, list[str]] = json.loads(file.read() or b"{}")
    except ValueError:  # a damaged file is as good as none
        return {}
    return kept if isinstance(kept, dict) else {}


def _shapes(module: Any) -> str:
    """A name for what few models share: looked for first, as it takes no look at weights."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors_of(module).items()}
    kind = {"class": type(module).__qualname__, "names": names.FORMAT}
    return fingerprint(kind | {"shapes": shapes})


def _weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """A name for what tensors hold, once they are rounded to float16."""
    sums = {}
    for name, tensor in tensors.items():
        bits = tensor.detach().to(torch.float16).contiguous().view(torch.int16)
        rows = bits.flatten(1) if bits.ndim > 1 else bits[None]
        columns = rows.sum(0, dtype=torch.int64)
        places = torch.arange(1, len(columns) + 1, device=columns.device)
        sums[name] = [int(columns.sum()), int((columns * places).sum())]
    return fingerprint({"sums": sums})
