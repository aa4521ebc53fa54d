"""Settings of every test run: offline, one torch thread a worker, an engine cache of its own."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

_engine_cache = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Runs before any test module imports transformers or fastgen, which read these."""
    config.stash[_engine_cache] = folder = tempfile.TemporaryDirectory(prefix="fastgen-tests-")
    os.environ["FASTGEN_CACHE"] = folder.name
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.pop("FASTGEN_ENGINE_OPTIONS", None)
    # The models are tiny and the tests run side by side.
    torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the engine cache of this run."""
    config.stash[_engine_cache].cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `cuda` where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def engine_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty engine cache folder for one test, named by FASTGEN_CACHE."""
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    return tmp_path
