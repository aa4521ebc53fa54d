"""The layers of the package: who may import whom, and which libraries a layer may know.

The imports are read from the sources; those inside functions and under TYPE_CHECKING count too.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastgen"

#: What each part of fastgen (a module or a subpackage) may import from fastgen, from the bottom up.
#: Families (`models`) speak `ops`, never a backend; engines know no family; nothing but `models`
#: and the modules of a model's life imports `modeling`.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "hf": {"engine_cache", "engines", "errors", "options"},
    "explain": set(),
    "options": {"errors"},
    "target": {"errors"},
    "runtime": {"errors"},
    "processes": set(),
    "engine_cache": {"errors"},
    "capturable": {"errors"},
    "cuda": {"capturable", "errors"},
    "ops": {"errors", "target"},
    "graphs": {"errors", "ops", "target"},
    "engines": {
        *("cuda", "engine_cache", "errors", "graphs", "ops", "options", "processes", "runtime"),
        "target",
    },
    "bucket": {"capturing", "graphs", "target"},
    "engine_key": {"target"},
    "kv_cache": {"bucket", "hf"},
    "capturing": {"cuda", "engines", "options", "target"},
    "packing": set(),
    "encoder": {"capturing", "engines", "options", "packing", "graphs", "target"},
    "decoder": {
        *("bucket", "capturing", "engines", "errors", "kv_cache", "options", "graphs"),
        "target",
    },
    "fallback": {"errors"},
    "generation": {
        *("bucket", "capturable", "capturing", "decoder", "engines", "errors", "explain"),
        *("fallback", "hf", "kv_cache", "options"),
    },
    "standing": {"engines"},
    "weights": {"engines", "standing"},
    "modeling": {
        *("engine_cache", "engine_key", "engines", "errors", "explain", "graphs", "hf", "options"),
        "processes",
        *("runtime", "standing", "target", "weights"),
    },
    "refusals": {"fallback", "generation", "hf", "modeling", "weights"},
    "stacks": {
        *("bucket", "decoder", "encoder", "engines", "fallback", "generation", "hf", "kv_cache"),
        *("modeling", "refusals", "graphs", "target"),
    },
    "pretrained": {"hf", "modeling", "options", "stacks"},
    "modeling_seq2seq": {
        *("bucket", "decoder", "engines", "fallback", "generation", "graphs", "hf", "kv_cache"),
        *("modeling", "pretrained", "refusals", "stacks", "target", "weights"),
    },
    "modeling_causal": {
        *("bucket", "decoder", "engines", "fallback", "generation", "hf", "kv_cache", "modeling"),
        *("pretrained", "refusals", "stacks", "target"),
    },
    "models": {
        *("errors", "fallback", "hf", "modeling", "modeling_causal", "modeling_seq2seq", "ops"),
        *("pretrained", "refusals", "graphs", "stacks"),
    },
    "auto": {"errors", "models", "options"},
    "doctor": {"engine_cache", "engines", "errors", "hf", "options", "runtime"},
    "bench": {"errors", "options", "runtime"},
    "cli": {"auto", "bench", "doctor", "engine_cache", "errors", "options"},
    "__main__": {"cli"},
}

#: Libraries that only these parts may import.
ONLY_IN: dict[str, set[str]] = {
    "onnxruntime": {"engines", "runtime"},
    "onnxscript": {"engine_key", "graphs", "modeling", "models", "ops"},
    "tensorrt": {"engines"},
    "tensorrt_rtx": {"engines"},
    "ctranslate2": {"bench"},
}
#: Parts that must not know Hugging Face: the machinery below the models.
NO_TRANSFORMERS = {
    *("capturable", "cuda", "engine_cache", "engines", "errors", "graphs", "ops", "options"),
    *("packing", "processes", "runtime", "target"),
}


def imported_by(part: str) -> set[str]:
    """The full names of the modules that the sources of a part import."""
    folder = PACKAGE / part
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    names = set()
    for node in (n for f in files for n in ast.walk(ast.parse(f.read_text(), str(f)))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{part}: relative import at line {node.lineno}"
            base = node.module or ""
            names |= (
                {f"{base}.{alias.name}" for alias in node.names} if base == "fastgen" else {base}
            )
    return names


def inner_imports(part: str) -> set[str]:
    """The parts of fastgen that a part imports; public names lead to the part that makes them."""
    import fastgen

    inner = {name.split(".")[1] for name in imported_by(part) if name.startswith("fastgen.")}
    homes = {name: home.split(".")[1] for name, home in fastgen._HOMES.items()}
    return {homes.get(name, name) for name in inner} - {part, "__version__"}


PARTS = sorted(
    p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
)
PARTS.remove("__init__")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_only_what_its_layer_may(part: str) -> None:
    assert part in MAY_IMPORT, f"fastgen/{part}: give it a line in MAY_IMPORT"
    forbidden = inner_imports(part) - MAY_IMPORT[part]
    assert not forbidden, f"fastgen/{part} must not import {', '.join(sorted(forbidden))}"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_knows_only_the_libraries_of_its_layer(part: str) -> None:
    libraries = {name.split(".")[0] for name in imported_by(part)}
    forbidden = {lib for lib in libraries if part not in ONLY_IN.get(lib, {part})}
    if part in NO_TRANSFORMERS:
        forbidden |= libraries & {"transformers"}
    assert not forbidden, f"fastgen/{part} must not import {', '.join(sorted(forbidden))}"


def test_the_layers_have_no_cycle() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError


def test_no_line_for_a_part_that_is_gone() -> None:
    assert set(MAY_IMPORT) <= set(PARTS)
