"""What these tests find stays with them: other tests have models of the same weights."""

from pathlib import Path

import pytest

from fastgen.hf import found


@pytest.fixture(autouse=True)
def remembered_by_one_test(engine_cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "_here", {})
