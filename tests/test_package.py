"""The sdist: it holds what its tests need, and a description whose links work anywhere."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from tests.test_house import ROOT

#: Quick tests that need files beside the package: documents, the Makefile, examples.
TESTS = ["tests/test_house.py", "tests/examples/test_pronounce.py", "-k", "documents or lexicon"]


def project() -> dict[str, dict[str, str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python_files(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.py")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an sdist of this tree unpacks to."""
    for library in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(library, reason=f"needs {library}, of the extra dev")
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_its_tests_run(sdist: Path) -> None:
    held = {file.relative_to(sdist) for file in (sdist / "tests").rglob("*.py")}
    assert held == {file.relative_to(ROOT) for file in (ROOT / "tests").rglob("*.py")}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=sdist, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout) and " skipped" not in done.stdout
    for folder in ("benchmarks", "examples", "tools"):
        assert {f.name for f in (sdist / folder).iterdir()} >= python_files(ROOT / folder)


def test_links_of_its_description_lead_to_files_of_the_project(sdist: Path) -> None:
    description = (sdist / "PKG-INFO").read_text().split("\n\n", 1)[1]
    home = project()["urls"]["Homepage"]
    places = [
        f"{home}/blob/main/",
        home.replace("//github.", "//raw.githubusercontent.") + "/main/",
    ]
    links = re.findall(r"\]\(([^)\s]+)\)", description)
    own = [link for link in links if not link.startswith("#")]
    assert len(own) > 5
    for link in own:
        place = next((place for place in places if link.startswith(place)), None)
        if place is None:
            assert link.startswith("https://"), link
        else:
            assert (ROOT / link.removeprefix(place).partition("#")[0]).is_file(), link


def test_it_says_where_the_project_lives(sdist: Path) -> None:
    information = (sdist / "PKG-INFO").read_text()
    assert set(project()["urls"]) == {"Homepage", "Documentation", "Changelog", "Issues"}
    for name, url in project()["urls"].items():
        assert f"Project-URL: {name}, {url}\n" in information
