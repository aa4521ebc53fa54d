"""Entries of the engine cache that are files: too large to be read whole, and mapped instead."""

import errno
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from filelock import FileLock

from fastgen import fingerprint as fingerprints
from fastgen.engine_cache import EngineCache, Pruned
from fastgen.fingerprint import digest, file_digest, fingerprint
from tests.engine_cache_helpers import KEY, run_python, wait_until

DATA = bytes(range(256)) * 5


class Writer:
    """Writes ``DATA``, or half of it and raises, and counts its calls."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.calls = error, 0

    def __call__(self, file: BinaryIO) -> None:
        self.calls += 1
        if self.error is not None:
            file.write(DATA[: len(DATA) // 2])
            raise self.error
        file.seek(4)  # in any order
        file.write(DATA[4:])
        file.seek(0)
        file.write(DATA[:4])


def file(folder: Path, write: Callable[[BinaryIO], None]) -> Path | None:
    return EngineCache(folder).file(KEY, write, title="weights")


def left(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()} - {".lock"}


def test_it_is_written_once(tmp_path: Path) -> None:
    write = Writer()
    for _ in range(2):
        path = file(tmp_path, write)
        assert path is not None and path.read_bytes() == DATA
    assert write.calls == 1 and left(tmp_path) == {".bin", ".json"}
    (entry,) = EngineCache(tmp_path).entries()
    assert (entry.title, entry.size, entry.key) == ("weights", len(DATA), KEY)
    assert EngineCache(tmp_path).verify() == []
    assert EngineCache(tmp_path).prune(max_bytes=0).removed == [fingerprint(KEY)]
    assert left(tmp_path) == set()


def cut(path: Path) -> None:
    os.truncate(path, len(DATA) - 1)


def flip(path: Path) -> None:
    path.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))


def remove(path: Path) -> None:
    path.unlink()


def lie(path: Path) -> None:
    """A record that says the file is an artifact like others."""
    record = path.with_suffix(".json")
    record.write_text(record.read_text().replace('"file": true', '"file": false'))


@pytest.mark.parametrize("damage", [cut, flip, remove, lie])
def test_a_damaged_one_is_written_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write = Writer()
    path = file(tmp_path, write)
    assert path is not None
    damage(path)
    assert [problem.fingerprint for problem in EngineCache(tmp_path).verify()] == [path.stem]
    with pytest.warns(RuntimeWarning, match="is damaged"):
        path = file(tmp_path, write)
    assert path is not None and path.read_bytes() == DATA and write.calls == 2


@pytest.mark.parametrize("error", [ValueError("an infinity"), KeyboardInterrupt()])
def test_errors_of_the_writer_pass_through_and_leave_nothing(
    tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        file(tmp_path, Writer(error))
    assert caught.value is error and left(tmp_path) == set()


def test_a_full_disk_only_warns(tmp_path: Path) -> None:
    write = Writer(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [file(tmp_path, write) for _ in range(2)] == [None, None]
    assert [str(tmp_path) in str(warning.message) for warning in caught] == [True]
    assert left(tmp_path) == set()


def test_a_folder_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    assert file(tmp_path, Writer()) is not None
    monkeypatch.setattr(FileLock, "acquire", no_locks)
    write = Writer()
    assert file(tmp_path, write) is not None  # what is there is read all the same
    with pytest.warns(RuntimeWarning, match="not usable"):
        assert EngineCache(tmp_path).file({"other": 1}, write, title="weights") is None
    assert write.calls == 0


HALF_WAY = """
import sys, time
from pathlib import Path
from fastgen.engine_cache import EngineCache
def write(file):
    file.write(b"half")
    file.flush()
    Path(sys.argv[2]).touch()
    time.sleep(600)
EngineCache(Path(sys.argv[1])).file({"name": "victim"}, write, title="victim")
"""


def test_a_process_that_dies_half_way_leaves_no_entry(tmp_path: Path) -> None:
    folder, marker = tmp_path / "engines", tmp_path / "writing"
    process = run_python(HALF_WAY, folder, marker)
    wait_until(marker.exists, process)
    assert EngineCache(folder).verify() == []  # it is at it
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cache, name = EngineCache(folder), fingerprint({"name": "victim"})
    assert cache.entries() == [] and [problem.fingerprint for problem in cache.verify()] == [name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = cache.file({"name": "victim"}, Writer(), title="victim")
    assert path is not None and path.read_bytes() == DATA and cache.verify() == []
    assert cache.prune(max_bytes=0) == Pruned([name], [], freed_bytes=cache_size(path))


def cache_size(path: Path) -> int:
    """Of the pruned entry: its data, and its record, whose text is as long each time."""
    assert not path.exists()
    other = EngineCache(path.parent).file({"name": "victim"}, Writer(), title="victim")
    assert other == path
    return path.stat().st_size + path.with_suffix(".json").stat().st_size


def test_every_byte_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_PIECE", 16)
    monkeypatch.setattr(fingerprints, "_BUFFER", 5)
    path, seen = tmp_path / "data", set()
    for size in (0, 1, 15, 16, 17, 40):
        for at in range(size + 1):
            data = bytearray(size)
            if at < size:
                data[at] = 1
            path.write_bytes(data)
            found = digest(memoryview(data))
            assert found == file_digest(path)
            seen.add(found)
    assert len(seen) == sum(size + 1 for size in (0, 1, 15, 16, 17, 40))
