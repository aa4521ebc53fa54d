"""What names and seals an entry of the engine cache: digests of the one JSON text of a key."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

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
