"""The house rules: small files and functions, and documents whose commands and links exist."""

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from fastgen import EngineOptions
from fastgen.cli import app

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    file
    for folder in ("fastgen", "tests", "examples", "benchmarks", "tools")
    for file in (ROOT / folder).rglob("*.py")
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_files_and_functions_are_small(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name}: {lines} lines"


def commands(document: Path) -> list[str]:
    """The lines of a document's shell blocks, and its inline `make ...` and `fastgen ...`."""
    text = document.read_text()
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`((?:make|fastgen) [^`]+)`", text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_make_targets_in_documents_exist(document: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(document):
        if command.startswith("make "):
            assert command.split()[1] in targets, command


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_fastgen_commands_in_documents_exist(document: Path) -> None:
    for line in commands(document):
        if line.startswith("fastgen "):
            check_command(shlex.split(line, comments=True)[1:])


def check_command(words: list[str]) -> None:
    """Asserts that each subcommand and option of a command line is one of the program's."""
    command: Any = get_command(app)
    for word in words:
        known = {option for parameter in command.params for option in parameter.opts}
        if word.startswith("-"):
            assert word.split("=")[0] in known | {"--help"}, f"{word}: not an option of {words}"
        elif subcommands := getattr(command, "commands", None):
            assert word in subcommands, f"{word}: not a command of fastgen"
            command = subcommands[word]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_in_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_engine_option_is_described() -> None:
    text = (ROOT / "docs" / "options.md").read_text()
    for option in fields(EngineOptions):
        assert f"| `{option.name}` | `{option.default}` |" in text, option.name
