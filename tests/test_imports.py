"""The rooms of the package: each file imports from its own room or from those above it, in no
circle, and only some rooms may know a library.

The imports are read from the sources; those inside functions and under TYPE_CHECKING count too.
"""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from fastgen import registry

PACKAGE = Path(__file__).parent.parent / "fastgen"

#: A room is a folder, or some files; each may import from itself and from those above.
ROOMS: tuple[tuple[str, ...], ...] = (
    # What every room may know
    ("errors", "options", "blockwise", "calibration", "int8"),
    ("target", "runtime", "fingerprint", "file_pages", "progress", "engine_cache"),
    ("capturable", "cuda", "cuda_graph", "processes", "fallback", "explain", "registry"),
    ("ops",),
    ("graphs",),
    ("engines",),
    ("execution",),
    ("hf",),
    ("generation",),
    ("tasks",),
    ("models",),
    ("auto", "doctor", "bench", "precision", "quantize"),
    ("cli", "__main__"),
)
ORDER = {part: number for number, parts in enumerate(ROOMS) for part in parts}

#: Rooms above that a room must not look into: families speak `ops`, and never a backend; what is
#: measured is measured as a program would.
CLOSED = {
    "models": {"cuda", "cuda_graph", "engines", "execution", "generation", "runtime", "target"},
    "bench": {"engines", "execution", "generation", "hf", "models", "ops", "tasks"},
}

#: Libraries that only these parts may import.
ONLY_IN: dict[str, set[str]] = {
    "onnxruntime": {"engines", "quantize", "runtime"},
    "onnxscript": {"graphs", "hf", "models", "ops"},
    "tensorrt": {"engines"},
    "tensorrt_rtx": {"engines"},
    "ctranslate2": {"bench"},
    "optimum": {"bench"},
}
#: The last part that must not know Hugging Face: the machinery below the models.
LAST_WITHOUT_TRANSFORMERS = "execution"

FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
del FILES["__init__"]  # makes public names on demand: who imports one imports its home


@cache
def imported_by(name: str) -> frozenset[str]:
    """The full names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"fastgen/{name}: relative import at line {node.lineno}"
            base = node.module or ""
            for full in (f"{base}.{alias.name}" for alias in node.names):
                names.add(full if base == "fastgen" or inner(full) in FILES else base)
    return frozenset(names)


def inner(name: str) -> str:
    """The file that a full name stands for, as in FILES; public names lead to their homes."""
    name = name.removeprefix("fastgen.")
    return registry.HOMES.get(name, "").removeprefix("fastgen.") or name


def imports(name: str) -> set[str]:
    """The files of fastgen that a file imports."""
    names = {inner(n) for n in imported_by(name) if n.startswith("fastgen.")}
    return names - {"__version__"}


def part(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_from_its_own_room_and_those_above(name: str) -> None:
    assert part(name) in ORDER, f"fastgen/{name}: give it a room in ROOMS"
    if "fastgen" in imported_by(name):  # and with it every name
        assert ORDER[part(name)] >= ORDER["auto"], f"fastgen/{name} must not import all of fastgen"
    for other in sorted(imports(name)):
        assert other in FILES, f"fastgen/{name} imports {other}: no such file"
        above = ORDER[part(other)] <= ORDER[part(name)]
        closed = part(other) in CLOSED.get(part(name), ())
        assert above and not closed, f"fastgen/{name} must not import fastgen/{other}"


def test_no_circle_of_files() -> None:
    TopologicalSorter({name: imports(name) for name in FILES}).prepare()  # raises CycleError


@pytest.mark.parametrize("name", FILES)
def test_a_file_knows_only_the_libraries_of_its_room(name: str) -> None:
    libraries = {full.partition(".")[0] for full in imported_by(name)}
    forbidden = {lib for lib in libraries if part(name) not in ONLY_IN.get(lib, {part(name)})}
    if ORDER[part(name)] <= ORDER[LAST_WITHOUT_TRANSFORMERS]:
        forbidden |= libraries & {"transformers"}
    assert not forbidden, f"fastgen/{name} must not import {', '.join(sorted(forbidden))}"


def test_no_line_for_a_part_that_is_gone() -> None:
    named = {*ORDER, *CLOSED, *set().union(*CLOSED.values()), *set().union(*ONLY_IN.values())}
    assert named <= {part(name) for name in FILES}
