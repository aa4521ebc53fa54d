"""What names and seals an entry of the engine cache: digests of the one JSON text of a key."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

_PIECE = 4 << 20  # bytes that a thread looks at
_BUFFER = 1 << 18  # bytes of them that are in memory at once, as a thread's heap may keep so many
_MOST_THREADS = 8

FORMAT = 1  # part of every fingerprint: entries of another layout are simply not found


def fingerprint(key: Mapping[str, object]) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of ``key``.

    Raises:
        TypeError: the key holds something that is not JSON, such as a path or a time.
    """
    return hashlib.sha256(_canonical({"format": FORMAT, "key": as_json(dict(key))})).hexdigest()


def _canonical(value: object) -> bytes:
    """The one JSON text of ``value``: sorted keys, no spaces, no NaN."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_refuse
    )
    return text.encode()


def as_json(value: object) -> Any:
    """``value`` as it reads back from disk: tuples are lists, the keys of dicts are strings."""
    return json.loads(_canonical(value))


def _refuse(value: object) -> NoReturn:
    raise TypeError(
        f"Engine cache keys and metadata cannot hold {value!r}: allowed are str, int, float, bool, "
        "None, lists and dicts. Say what changes the engine, never a path or a time."
    )


def checksum(record: Mapping[str, object], data: bytes) -> str:
    """SHA-256 over the record (without its own checksum) and the data."""
    digest = hashlib.sha256(_canonical(record))
    digest.update(data)
    return digest.hexdigest()


def digest(data: memoryview) -> bytes:
    """A digest of bytes: SHA-256 over those of its pieces, by several threads."""
    return _digest(len(data), lambda at: hashlib.sha256(data[at : at + _PIECE]))


def file_digest(path: Path) -> bytes:
    """The ``digest`` of a file's bytes, of which little is in memory at once.

    Raises:
        OSError: it cannot be read.
    """

    def look(at: int) -> "hashlib._Hash":
        found, buffer, left = hashlib.sha256(), memoryview(bytearray(_BUFFER)), _PIECE
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            while left and (size := file.readinto(buffer[:left])):
                found.update(buffer[:size])
                left -= size
        return found

    return _digest(path.stat().st_size, look)


def _digest(size: int, look: Callable[[int], "hashlib._Hash"]) -> bytes:
    """Args:
    look: gives the SHA-256 of the piece that begins there.
    """
    starts = range(0, size, _PIECE)
    if len(starts) < 2:
        sums = [look(at).digest() for at in starts]
    else:
        with ThreadPoolExecutor(min(len(starts), _MOST_THREADS, os.cpu_count() or 1)) as threads:
            sums = [found.digest() for found in threads.map(look, starts)]
    return hashlib.sha256(b"".join(sums)).digest()
