"""The package as type checkers see it: real classes, and options by their names and types."""

import ast
import importlib
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import fastgen
from fastgen import registry

ROOT = Path(fastgen.__file__).parent.parent

#: A program, and beside its lines what a type checker must say of them.
PROGRAM = """
from fastgen import EngineOptions, FastAutoModelForSeq2SeqLM, FastT5, FastT5EncoderModel

options = EngineOptions(prepack=1, backend="onnxruntime")
EngineOptions(prepak=1)  # error: Unexpected keyword argument "prepak"
EngineOptions(backend="tensorflow")  # error: incompatible type "Literal['tensorflow']"
EngineOptions(min_bucket="8")  # error: expected "int"
options.prepack = 0.5  # error: read-only
model = FastT5.from_pretrained("t5-small", engine_options=options)
reveal_type(model)  # note: fastgen.models.t5.FastT5ForConditionalGeneration
reveal_type(model.engine_options)  # note: fastgen.options.EngineOptions
reveal_type(FastT5EncoderModel.from_pretrained("t5-small"))  # note: models.t5.FastT5EncoderModel
FastT5.from_pretrained("t5-small", engine_options=1)  # error: incompatible type "int"
FastAutoModelForSeq2SeqLM.from_pretrained("t5-small", fallback=True)
from fastgen import FastT6  # error: "FastT6"
"""

#: torch and transformers are taken as Any, which keeps mypy quick: 10 s where they take a minute.
SETTINGS = """
[mypy]
[mypy-fastgen.*]
follow_imports = silent
[mypy-torch.*,transformers.*,onnx.*,onnx_ir.*,onnxscript.*,onnxruntime.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_a_program_is_type_checked(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="needs mypy, of the extra dev")
    program, settings = tmp_path / "program.py", tmp_path / "mypy.ini"
    program.write_text(PROGRAM)
    settings.write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), str(program)]
    command += ["--cache-dir", str(tmp_path / "cache"), "--no-error-summary", "--no-pretty"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found: dict[int, str] = {}
    for line in result.stdout.splitlines():
        place, message = line.split(": ", 1)
        assert place.startswith(str(program)), line
        number = int(place.rsplit(":", 1)[1])
        found[number] = found.get(number, "") + message
    expected = {
        number: line.split("  # ")[1]
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if "  # " in line
    }
    assert found.keys() == expected.keys(), result.stdout + result.stderr
    for number, comment in expected.items():
        kind, text = comment.split(": ", 1)
        assert found[number].startswith(kind) and text in found[number]


def test_type_checkers_see_every_public_name() -> None:
    assert resources.files("fastgen").joinpath("py.typed").is_file()
    seen = {}
    for node in ast.walk(ast.parse(Path(fastgen.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (home := node.module or "").startswith("fastgen."):
            names = [alias.name for alias in node.names if alias.asname == alias.name]
            if node.names[0].name == "*":
                names = importlib.import_module(home).__all__
            seen |= dict.fromkeys(names, home)
    assert seen == registry.HOMES
    assert all(getattr(fastgen, name) for name in fastgen.__all__)
