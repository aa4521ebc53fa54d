"""The engine cache: hits, misses, keys, sharing between processes, pruning, progress."""

import errno
import json
import os
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
from filelock import FileLock

from fastgen import progress
from fastgen.engine_cache import Artifact, EngineCache, Pruned, default_folder
from fastgen.fingerprint import fingerprint
from tests.engine_cache_helpers import ARTIFACT, KEY, Builder, run_python, wait_until


def fill(cache: EngineCache, name: str, size: int = 100, age_days: float = 0) -> str:
    """Store an entry of ``size`` bytes, last used ``age_days`` ago; returns its fingerprint."""
    key = {"name": name}
    cache.load_or_build(key, Builder(Artifact(b"x" * size, {})), title=name)
    used = time.time() - age_days * 86_400
    os.utime(cache.folder / f"{fingerprint(key)}.bin", (used, used))
    return fingerprint(key)


def test_miss_builds_and_hit_loads(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(2):
        # A new object each time, as a new process would have.
        assert EngineCache(tmp_path).load_or_build(KEY, build, title="step") == ARTIFACT
    assert build.calls == 1


def test_metadata_is_the_same_on_miss_and_hit(tmp_path: Path) -> None:
    build = Builder(Artifact(b"", {"shape": (1, 2), "names": {3: "c"}}))
    miss, hit = (EngineCache(tmp_path).load_or_build(KEY, build, title="t") for _ in range(2))
    assert miss == hit == Artifact(b"", {"shape": [1, 2], "names": {"3": "c"}})


def test_each_version_has_its_own_entry(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    builds = {v: Builder(Artifact(v.encode(), {})) for v in ("1.31.1", "1.32.0")}
    for _ in range(2):
        for version, build in builds.items():
            key = {**KEY, "backend": {"version": version}}
            assert cache.load_or_build(key, build, title=version).data == version.encode()
    assert [build.calls for build in builds.values()] == [1, 1]
    assert {entry.title for entry in cache.entries()} == {"1.31.1", "1.32.0"}


def test_fingerprint_depends_on_content_only() -> None:
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    # Integer keys sort differently as numbers and as the strings they become on disk.
    assert fingerprint({"layers": {2: "x", 10: "y"}}) == fingerprint(
        {"layers": {"2": "x", "10": "y"}}
    )


@pytest.mark.parametrize("bad", [Path("model"), timedelta(1), b"bytes", object()])
def test_keys_and_metadata_that_are_not_json_are_refused(tmp_path: Path, bad: object) -> None:
    with pytest.raises(TypeError, match="never a path or a time"):
        fingerprint({"model": bad})
    with pytest.raises(TypeError, match="allowed are str"):
        EngineCache(tmp_path).load_or_build(KEY, Builder(Artifact(b"", {"m": bad})), title="t")
    assert EngineCache(tmp_path).entries() == []


def test_record_is_readable_json(tmp_path: Path) -> None:
    EngineCache(tmp_path).load_or_build(KEY, Builder(), title="T5 step")
    text = (tmp_path / f"{fingerprint(KEY)}.json").read_text()
    record = json.loads(text)
    assert record["key"] == KEY and record["meta"] == ARTIFACT.meta
    assert record["title"] == "T5 step" and record["bytes"] == len(ARTIFACT.data)
    assert len(text.splitlines()) > 10  # indented, for people
    assert (tmp_path / f"{fingerprint(KEY)}.bin").read_bytes() == ARTIFACT.data


@pytest.mark.parametrize("error", [ValueError("no such operator"), OSError(errno.EIO, "gpu gone")])
def test_errors_of_the_build_pass_through(tmp_path: Path, error: Exception) -> None:
    cache = EngineCache(tmp_path)
    with warnings.catch_warnings(), pytest.raises(type(error)) as caught:
        warnings.simplefilter("error")
        cache.load_or_build(KEY, Builder(error=error), title="step")
    assert caught.value is error
    assert cache.load_or_build(KEY, Builder(), title="step") == ARTIFACT


BUILD_ONCE = """
import sys, time
from pathlib import Path
from fastgen.engine_cache import Artifact, EngineCache
folder, log, go = map(Path, sys.argv[1:])
def build():
    with log.open("a") as file:
        file.write("built\\n")
    while not go.exists():
        time.sleep(0.01)
    return Artifact(b"once", {})
print(EngineCache(folder).load_or_build({"name": "shared"}, build, title="shared").data.decode())
"""


def test_two_processes_compile_once(tmp_path: Path) -> None:
    folder, log, go = tmp_path / "engines", tmp_path / "log", tmp_path / "go"
    first = run_python(BUILD_ONCE, folder, log, go)
    wait_until(log.exists, first)
    second = run_python(BUILD_ONCE, folder, log, go)  # the first one is inside its build
    go.touch()
    for process in (first, second):
        stdout, stderr = process.communicate(timeout=120)
        assert (process.returncode, stdout) == (0, "once\n"), stderr
    assert log.read_text() == "built\n"


def test_threads_compile_once(tmp_path: Path) -> None:
    inside, results = threading.Event(), []
    calls = []

    def build() -> Artifact:
        calls.append(1)
        inside.wait(60)
        return ARTIFACT

    def load() -> None:
        results.append(EngineCache(tmp_path).load_or_build(KEY, build, title="step"))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.set()
    for thread in threads:
        thread.join()
    assert results == [ARTIFACT] * 4 and len(calls) == 1


def test_prune_while_an_entry_is_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, build = EngineCache(tmp_path), Builder()
    cache.load_or_build(KEY, build, title="step")
    read_bytes, removed = Path.read_bytes, []

    def prune_before_data(path: Path) -> bytes:
        if path.suffix == ".bin":
            monkeypatch.setattr(Path, "read_bytes", read_bytes)  # once; prune itself reads
            removed.extend(EngineCache(tmp_path).prune(max_bytes=0).removed)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", prune_before_data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load_or_build(KEY, build, title="step") == ARTIFACT
    assert removed == [fingerprint(KEY)] and build.calls == 2
    assert cache.verify() == [] and len(cache.entries()) == 1


def test_prune_by_age_and_by_size_takes_the_least_recently_used(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    new, middle, old = (fill(cache, f"{age}", age_days=age) for age in (0, 5, 50))
    assert [entry.fingerprint for entry in cache.entries()] == [new, middle, old]
    assert cache.prune() == Pruned([], [], 0)
    assert cache.prune(older_than=timedelta(days=10)).removed == [old]
    assert cache.prune(max_bytes=150).removed == [middle]
    assert cache.prune(max_bytes=100).removed == []
    pruned = cache.prune(max_bytes=0)
    assert pruned.removed == [new] and pruned.freed_bytes > 100
    assert cache.entries() == []


def test_a_hit_counts_as_use_but_verify_does_not(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    hit, unused = fill(cache, "hit", age_days=20), fill(cache, "unused", age_days=20)
    build = Builder()
    cache.load_or_build({"name": "hit"}, build, title="hit")
    assert build.calls == 0 and cache.verify() == []
    assert cache.prune(older_than=timedelta(days=10)).removed == [unused]
    assert [entry.fingerprint for entry in cache.entries()] == [hit]


def test_prune_and_verify_leave_alone_what_is_in_use(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    name = fill(cache, "being rebuilt")
    (tmp_path / f"{name}.json").unlink()
    with FileLock(tmp_path / f"{name}.lock"):
        assert cache.verify() == []
        assert cache.prune(max_bytes=0).removed == []
    assert len(cache.verify()) == 1
    name = fill(cache, "in use")
    with FileLock(tmp_path / f"{name}.lock"):
        assert cache.prune(max_bytes=0).skipped == [name]
    assert [entry.fingerprint for entry in cache.entries()] == [name]


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.json").write_text("{}")
    cache = EngineCache(tmp_path)
    fill(cache, "mine")
    assert len(cache.entries()) == 1 and cache.verify() == []
    cache.prune(max_bytes=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.json"]


def test_folder_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "none")
    assert (cache.entries(), cache.verify(), cache.prune(max_bytes=0)) == (
        [],
        [],
        Pruned([], [], 0),
    )
    assert not cache.folder.exists()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"FASTGEN_CACHE": "/engines"}, "/engines"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/fastgen"),
        ("linux", {}, "/home/ada/.cache/fastgen"),
        ("darwin", {}, "/home/ada/Library/Caches/fastgen"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fastgen"),
    ],
)
def test_default_folder(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("FASTGEN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/ada", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert default_folder() == Path(expected)
    assert EngineCache().folder == Path(expected)


def test_without_a_home_there_is_no_engine_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTGEN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(RuntimeWarning, match="not usable"):
        assert EngineCache().load_or_build(KEY, Builder(), title="step") == ARTIFACT


def test_progress_shows_a_long_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_DELAY_S", 0.01)
    with progress.progress("Compiling T5"):
        wait_until(lambda: "Compiling T5: 00:" in capsys.readouterr().err)


def test_progress_says_nothing_about_a_short_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_DELAY_S", 1e6)  # any step is short then
    EngineCache(tmp_path).load_or_build(KEY, Builder(), title="Compiling T5")
    assert capsys.readouterr().err == ""
