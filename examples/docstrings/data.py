"""The docstrings of Python's standard library, as bytes."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

END = 0
"""The byte that begins and ends a docstring; all others are ASCII, and each is a token."""
PAD = 127
"""The byte that fills rows of a batch; no docstring has it."""
VOCABULARY = 128
SKIPPED = ("test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__")
SHORTEST = 20  # characters


def docstrings(library: Path | None = None) -> list[str]:
    """Docstrings of all modules, classes and functions below a folder, without their indentation,
    each once, in the order of files' names; ASCII ones of at least 20 characters.

    Args:
        library: None is this Python's standard library.
    """
    folder = library or Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.rglob("*.py"))
    kept = (file for file in files if not set(SKIPPED) & set(file.relative_to(folder).parts))
    found = dict.fromkeys(text for file in kept for text in _of_file(file))
    return [text for text in found if len(text) >= SHORTEST and text.isascii()]


def is_held_out(text: str) -> bool:
    """True for the twentieth of all docstrings that training never sees, by a hash."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 // 20


def encode(texts: Iterable[str]) -> list[int]:
    """Token ids of texts, one after the other, each begun by END."""
    return [token for text in texts for token in (END, *text.encode("ascii"))]


def decode(tokens: Iterable[int]) -> str:
    """The text of tokens; END and PAD are left out."""
    return bytes(token for token in tokens if token not in (END, PAD)).decode("ascii")


def _of_file(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # files that show what is wrong
        return
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text.replace("\0", "").replace("\x7f", "")
