"""The engine cache when files are damaged, processes are killed or the disk is bad."""

import errno
import os
import signal
import tempfile
import warnings
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen import engine_cache
from fastgen.engine_cache import Artifact, EngineCache, Pruned
from fastgen.fingerprint import fingerprint
from tests.engine_cache_helpers import ARTIFACT, KEY, Builder, run_python, wait_until


def files(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in suffixes)


@pytest.mark.parametrize("suffix", ["bin", "json"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_truncated_entry_is_rebuilt_with_a_warning(
    tmp_path: Path, suffix: str, keep: float
) -> None:
    cache, build = EngineCache(tmp_path), Builder()
    cache.load_or_build(KEY, build, title="step")
    path = tmp_path / f"{fingerprint(KEY)}.{suffix}"
    os.truncate(path, int(path.stat().st_size * keep))
    assert [problem.fingerprint for problem in cache.verify()] == [fingerprint(KEY)]
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert cache.load_or_build(KEY, build, title="step") == ARTIFACT
    assert build.calls == 2 and cache.verify() == []
    assert cache.load_or_build(KEY, build, title="step") == ARTIFACT
    assert build.calls == 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    suffix=st.sampled_from(["bin", "json"]),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_no_bit_flip_ever_gives_a_wrong_artifact(suffix: str, where: float, bit: int) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache, build = EngineCache(Path(folder)), Builder()
        cache.load_or_build(KEY, build, title="step")
        path = Path(folder) / f"{fingerprint(KEY)}.{suffix}"
        content = bytearray(path.read_bytes())
        content[int(where * len(content))] ^= 1 << bit
        path.write_bytes(content)
        assert cache.load_or_build(KEY, build, title="step") == ARTIFACT
        assert cache.verify() == []
        # A flip between the tokens of the JSON may change nothing; everywhere else it is noticed.
        assert build.calls == 1 + len(caught)
        assert build.calls == 2 or suffix == "json"


def test_entry_under_another_fingerprint_is_damage(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    cache.load_or_build(KEY, Builder(), title="step")
    other = {**KEY, "dtype": "bfloat16"}
    for suffix in ("json", "bin"):
        source = tmp_path / f"{fingerprint(KEY)}.{suffix}"
        source.rename(tmp_path / f"{fingerprint(other)}.{suffix}")
    right = Builder(Artifact(b"bf16", {}))
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert cache.load_or_build(other, right, title="step").data == b"bf16"


def test_missing_data_file_is_damage(tmp_path: Path) -> None:
    cache, build = EngineCache(tmp_path), Builder()
    cache.load_or_build(KEY, build, title="step")
    (tmp_path / f"{fingerprint(KEY)}.bin").unlink()
    with pytest.warns(RuntimeWarning, match="data file is missing"):
        assert cache.load_or_build(KEY, build, title="step") == ARTIFACT


KILLED_IN_BUILD = """
import sys, time
from pathlib import Path
from fastgen.engine_cache import EngineCache
def build():
    Path(sys.argv[2]).touch()
    time.sleep(600)
EngineCache(Path(sys.argv[1])).load_or_build({"name": "victim"}, build, title="victim")
"""


def test_process_killed_while_building_leaves_nothing_broken(tmp_path: Path) -> None:
    folder, marker = tmp_path / "engines", tmp_path / "building"
    process = run_python(KILLED_IN_BUILD, folder, marker)
    wait_until(marker.exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cache = EngineCache(folder)
    assert cache.entries() == [] and cache.verify() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load_or_build({"name": "victim"}, Builder(), title="victim") == ARTIFACT


KILLED_IN_STORE = """
import os, sys
from pathlib import Path
from fastgen.engine_cache import Artifact, EngineCache
replace, moves = os.replace, []
def die_at_the_nth(source, target):
    moves.append(target)
    if len(moves) == int(sys.argv[2]):
        os._exit(9)
    replace(source, target)
os.replace = die_at_the_nth
artifact = Artifact(b"half", {})
EngineCache(Path(sys.argv[1])).load_or_build({"name": "victim"}, lambda: artifact, title="victim")
"""


@pytest.mark.parametrize("nth", [1, 2])
def test_process_killed_while_storing_leaves_no_entry(tmp_path: Path, nth: int) -> None:
    process = run_python(KILLED_IN_STORE, tmp_path, str(nth))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 9, stderr
    cache, key = EngineCache(tmp_path), {"name": "victim"}
    assert cache.entries() == []
    assert [problem.reason for problem in cache.verify()] == [
        "an interrupted build left it without a record"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load_or_build(key, Builder(), title="victim") == ARTIFACT
    assert cache.verify() == [] and files(tmp_path, ".tmp") == []


def test_prune_removes_what_an_interrupted_build_left(tmp_path: Path) -> None:
    leftover = tmp_path / f"{fingerprint(KEY)}.bin.tmp"
    leftover.write_bytes(b"half")
    assert EngineCache(tmp_path).prune() == Pruned([fingerprint(KEY)], [], freed_bytes=4)
    assert list(tmp_path.iterdir()) == []


def bad_disk(monkeypatch: pytest.MonkeyPatch, kind: str, folder: Path) -> None:
    if kind == "file in place of the folder":
        folder.write_text("not a folder")
    elif kind == "full disk":

        def write_half(path: Path, data: bytes) -> int:
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_bytes", write_half)
    elif kind == "read-only disk":

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(Path, "mkdir", refuse)
    elif kind == "no locks":

        def no_locks(*_: object, **__: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(FileLock, "acquire", no_locks)


@pytest.mark.parametrize(
    "kind", ["file in place of the folder", "full disk", "read-only disk", "no locks"]
)
def test_bad_disk_builds_every_time_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder, build = tmp_path / "engines", Builder()
    bad_disk(monkeypatch, kind, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            key = {**KEY, "number": number % 2}
            assert EngineCache(folder).load_or_build(key, build, title="step") == ARTIFACT
    assert build.calls == 3
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    message = str(caught[0].message)
    assert str(folder) in message and "FASTGEN_CACHE" in message
    cache = EngineCache(folder)
    assert cache.entries() == [] and cache.verify() == []
    if folder.is_dir():
        assert files(folder, ".bin", ".json", ".tmp") == []


def test_read_only_folder_still_serves_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EngineCache(tmp_path).load_or_build(KEY, Builder(), title="step")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for owner, name in ((FileLock, "acquire"), (os, "utime"), (os, "replace"), (Path, "mkdir")):
        monkeypatch.setattr(owner, name, refuse)
    build = Builder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EngineCache(tmp_path).load_or_build(KEY, build, title="step") == ARTIFACT
    assert build.calls == 0


def test_a_lock_never_given_back_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cache, "_LOCK_TIMEOUT_S", 0.01)
    build = Builder()
    held = FileLock(tmp_path / f"{fingerprint(KEY)}.lock")
    with held, pytest.warns(RuntimeWarning, match="could not be acquired"):
        assert EngineCache(tmp_path).load_or_build(KEY, build, title="step") == ARTIFACT
    assert build.calls == 1
