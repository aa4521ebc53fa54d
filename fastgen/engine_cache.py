"""The engine cache: compiled engines on disk, keyed by everything that changes them.

An entry is two files named after its fingerprint: ``<fingerprint>.bin`` (the artifact) and
``<fingerprint>.json`` (a readable record: title, key, metadata, checksum). The record is written
last, so an entry exists once its record does. Reading takes no lock; writing holds the entry's.
What is too large to be read whole is a ``file``: an entry whose data its user maps into memory.
"""

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from fastgen.fingerprint import FORMAT, as_json, checksum, file_digest, fingerprint
from fastgen.progress import progress

FOLDER_VARIABLE = "FASTGEN_CACHE"
_LOCK_TIMEOUT_S = 600.0  # a stopped process must not keep the others waiting for ever
_OWN_FILE = re.compile(r"([0-9a-f]{64})\.(json|bin)(\.tmp)?")
_SUFFIXES = ("json", "json.tmp", "bin", "bin.tmp")  # the record first: without it, no entry
_folders_warned_about: set[Path] = set()


@dataclass(frozen=True)
class Artifact:
    """A compiled engine as bytes, with JSON-able metadata (tensor specs, ...)."""

    data: bytes
    meta: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One stored artifact, as its record describes it; sizes in bytes, times in UTC."""

    fingerprint: str
    title: str
    size: int
    created: datetime
    last_used: datetime
    key: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A damaged or half-written entry, and what is wrong with it."""

    fingerprint: str
    reason: str


@dataclass(frozen=True)
class Pruned:
    """What ``prune`` did: fingerprints removed, fingerprints left alone, bytes given back."""

    removed: list[str]
    skipped: list[str]
    """Entries that another process is using or that the disk does not let go."""
    freed_bytes: int


def _record(key: Mapping[str, object], title: str, size: int, **more: object) -> dict[str, object]:
    """What is said of an entry, but for its checksum."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"format": FORMAT, "title": title, "created": created, "bytes": size, "key": key} | more


class _DamagedEntryError(Exception):
    """The files of an entry contradict each other; the message says how."""


def default_folder() -> Path:
    """``$FASTGEN_CACHE``, else ``fastgen`` in the platform's user cache folder."""
    if configured := os.environ.get(FOLDER_VARIABLE):
        return Path(configured).expanduser()
    try:
        if sys.platform == "win32":
            root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            root = Path.home() / "Library" / "Caches"
        else:
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home: a folder that cannot exist, so that using it warns and degrades
        root = Path(os.devnull)
    return root / "fastgen"


class EngineCache:
    """Compiled engines on disk, keyed by fingerprint.

    Never raises on a bad disk: degrades to building every time, with one warning per process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Use ``folder``, or ``default_folder()`` if None; it is made on the first write."""
        self.folder = default_folder() if folder is None else Path(folder).expanduser()

    def load_or_build(
        self, key: Mapping[str, object], build: Callable[[], Artifact], *, title: str
    ) -> Artifact:
        """Return the artifact stored under ``key``, or build and store it.

        Args:
            key: everything that changes the artifact (JSON-able; never a path or a time).
            build: compiles the artifact; its errors pass through, and nothing is stored then.
            title: what the progress bar and ``fastgen cache list`` show.

        Returns:
            The artifact; its metadata went through JSON, on a hit and on a miss alike.

        Raises:
            TypeError: ``key`` or the artifact's metadata is not JSON-able.
        """
        key = as_json(dict(key))
        name = fingerprint(key)
        with contextlib.suppress(OSError, _DamagedEntryError):  # looked at again under the lock
            return self._load(name)
        with progress(title), self._locked_or_warned(name) as locked:
            if locked and (artifact := self._load_or_discard(name)) is not None:
                return artifact
            artifact = build()
            artifact = Artifact(artifact.data, as_json(artifact.meta))
            if locked:
                self._store(name, key, title, artifact)
            return artifact

    def file(
        self, key: Mapping[str, object], write: Callable[[BinaryIO], None], *, title: str
    ) -> Path | None:
        """Return the path of the file stored under ``key``, or write and store it.

        Args:
            key: as of ``load_or_build``.
            write: writes the file's bytes. Its errors pass through, but for an OSError, which is
                the disk's; nothing is stored then.
            title: what ``fastgen cache list`` shows.

        Returns:
            A file that is whole; nobody changes it, though somebody may remove it. None where the
            folder cannot hold it, of which a warning tells, once a process.
        """
        key = as_json(dict(key))
        name = fingerprint(key)
        path = self._path(name, "bin")
        with contextlib.suppress(OSError, _DamagedEntryError):  # looked at again under the lock
            self._load(name)
            return path
        with self._locked_or_warned(name) as locked:
            if not locked:
                return None
            there = self._load_or_discard(name) is not None
            return path if there or self._store_file(name, key, title, write) else None

    def discard(self, key: Mapping[str, object], reason: str) -> None:
        """Throw away, with a warning, an entry that is whole but that its library refuses."""
        name = fingerprint(key)
        entry = self._path(name, "json")
        text = f"Engine cache entry {entry} is of no use here and is built again: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        with contextlib.suppress(OSError), self._lock(name, _LOCK_TIMEOUT_S):
            self._remove(name)

    def entries(self) -> list[Entry]:
        """All readable entries, the last used first (see ``verify`` for the others)."""
        found = []
        for name in self._names():
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                record = json.loads(self._path(name, "json").read_bytes())
                stat = self._path(name, "bin").stat()
                created = datetime.fromisoformat(record["created"])
                used = datetime.fromtimestamp(stat.st_mtime, UTC)
                found.append(
                    Entry(name, record["title"], stat.st_size, created, used, record["key"])
                )
        return sorted(found, key=lambda entry: entry.last_used, reverse=True)

    def verify(self) -> list[Problem]:
        """Read every entry and check it; one that a process is writing right now is left out."""
        problems = []
        for name in self._names():
            if self._damage(name) and not self._in_use(name) and (reason := self._damage(name)):
                problems.append(Problem(name, reason))
        return problems

    def prune(self, *, older_than: timedelta | None = None, max_bytes: int | None = None) -> Pruned:
        """Remove damaged entries, and those the limits exclude.

        Args:
            older_than: remove what was last used longer ago than this.
            max_bytes: remove the least recently used until the rest fits; 0 removes all.
        """
        doomed = {problem.fingerprint for problem in self.verify()}
        now, total = datetime.now(UTC), 0
        for entry in self.entries():
            total += entry.size
            stale = older_than is not None and now - entry.last_used > older_than
            if stale or (max_bytes is not None and total > max_bytes):
                doomed.add(entry.fingerprint)
        removed, skipped, freed = [], [], 0
        for name in sorted(doomed):
            try:
                with self._lock(name, timeout=0):
                    size = self._size(name)
                    self._remove(name)
                    # Safe while held: a waiter notices the unlinked file and opens a new one.
                    self._path(name, "lock").unlink(missing_ok=True)
            except OSError:
                skipped.append(name)
            else:
                removed.append(name)
                freed += size
        return Pruned(removed, skipped, freed)

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}.{suffix}"

    def _names(self) -> list[str]:
        """Fingerprints that have a file here; files of anyone else are never touched."""
        try:
            matches = [_OWN_FILE.fullmatch(path.name) for path in self.folder.iterdir()]
        except OSError:
            return []
        return sorted({match[1] for match in matches if match})

    def _size(self, name: str) -> int:
        paths = [self._path(name, suffix) for suffix in _SUFFIXES]
        return sum(path.stat().st_size for path in paths if path.exists())

    @contextlib.contextmanager
    def _lock(self, name: str, timeout: float) -> Iterator[None]:
        """Hold the entry's lock.

        Raises:
            OSError: the folder cannot be locked, or (Timeout) someone else holds the lock.
        """
        with FileLock(self._path(name, "lock"), timeout=timeout):
            yield

    @contextlib.contextmanager
    def _locked_or_warned(self, name: str) -> Iterator[bool]:
        """Hold the entry's lock and give True; where that is impossible, warn and give False."""
        with contextlib.ExitStack() as stack:
            locked = False
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self._lock(name, _LOCK_TIMEOUT_S))
                locked = True
            except OSError as error:
                self._warn_once(error)
            yield locked

    def _in_use(self, name: str) -> bool:
        try:
            with self._lock(name, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            return False  # a folder nobody can lock is a folder nobody writes to

    def _load(self, name: str) -> Artifact:
        """``_read`` an entry that is going to be used, and note the time for ``prune``."""
        artifact = self._read(name)
        with contextlib.suppress(OSError):  # only the order of pruning is lost
            os.utime(self._path(name, "bin"))
        return artifact

    def _read(self, name: str) -> Artifact:
        """Read and check an entry; of a ``file`` the data are not returned.

        Raises:
            OSError: there is none (FileNotFoundError) or it cannot be read.
            _DamagedEntryError: it is not what was written.
        """
        text = self._path(name, "json").read_bytes()
        path = self._path(name, "bin")
        try:
            record = json.loads(text)
            written = record.pop("sha256")
            file = record.get("file", False)
            data = b"" if file else path.read_bytes()
            size = path.stat().st_size if file else len(data)
            if record["bytes"] != size:
                raise _DamagedEntryError(f"{size} bytes instead of {record['bytes']}")
            seal = checksum(record, file_digest(path) if file else data)
            if written != seal or name != fingerprint(record["key"]):
                raise _DamagedEntryError("its checksum does not match")
        except FileNotFoundError:
            raise _DamagedEntryError("its data file is missing") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _DamagedEntryError(f"its record is unreadable ({error})") from None
        return Artifact(data, record["meta"])

    def _load_or_discard(self, name: str) -> Artifact | None:
        """Under the lock: the entry, or None after a damaged one was thrown away."""
        try:
            return self._load(name)
        except FileNotFoundError:
            return None
        except _DamagedEntryError as damage:
            warnings.warn(
                f"Engine cache entry {self._path(name, 'json')} is damaged: {damage}. "
                "It is thrown away and built again.",
                RuntimeWarning,
                stacklevel=3,
            )
        except OSError as error:
            self._warn_once(error)
        with contextlib.suppress(OSError):  # what stays is overwritten or found damaged again
            self._remove(name)
        return None

    def _damage(self, name: str) -> str | None:
        """Why the files of ``name`` are not a good entry; None if they are, or are gone."""
        try:
            self._read(name)
        except FileNotFoundError:
            return "an interrupted build left it without a record" if self._size(name) else None
        except (OSError, _DamagedEntryError) as error:
            return str(error)
        return None

    def _store(self, name: str, key: Mapping[str, object], title: str, artifact: Artifact) -> None:
        """Under the lock: write both files whole or not at all; a bad disk only warns."""
        record = _record(key, title, len(artifact.data), meta=artifact.meta)
        record["sha256"] = checksum(record, artifact.data)
        with self._whole_or_warned(name):
            self._write(name, "bin", artifact.data)
            self._write(name, "json", json.dumps(record, indent=2).encode())

    def _store_file(
        self,
        name: str,
        key: Mapping[str, object],
        title: str,
        write: Callable[[BinaryIO], None],
    ) -> bool:
        """As ``_store``, of a ``file``; whether it is there."""
        temporary, stored = self._path(name, "bin.tmp"), False
        with self._whole_or_warned(name):
            with temporary.open("wb") as file:
                write(file)
            record = _record(key, title, temporary.stat().st_size, meta={}, file=True)
            record["sha256"] = checksum(record, file_digest(temporary))
            os.replace(temporary, self._path(name, "bin"))
            self._write(name, "json", json.dumps(record, indent=2).encode())
            stored = True
        return stored

    @contextlib.contextmanager
    def _whole_or_warned(self, name: str) -> Iterator[None]:
        """Leave nothing of an entry whose body fails; what the disk does wrong only warns."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._remove(name)
            if not isinstance(error, OSError):
                raise
            self._warn_once(error)

    def _write(self, name: str, suffix: str, data: bytes) -> None:
        # One temporary name per entry is enough under its lock, and a killed process leaves at
        # most one behind. No fsync: what a power cut truncates, the checksum catches.
        temporary = self._path(name, f"{suffix}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, self._path(name, suffix))

    def _remove(self, name: str) -> None:
        for suffix in _SUFFIXES:
            self._path(name, suffix).unlink(missing_ok=True)

    def _warn_once(self, error: OSError) -> None:
        if self.folder in _folders_warned_about:
            return
        _folders_warned_about.add(self.folder)
        warnings.warn(
            f"The engine cache folder {self.folder} is not usable ({error}), so engines are built "
            f"anew in every process. Set {FOLDER_VARIABLE} to a folder that can be written, or "
            "EngineOptions(disk_cache=False) to do without.",
            RuntimeWarning,
            stacklevel=2,
        )
