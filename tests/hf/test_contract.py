"""What fastgen relies on in transformers is there, and is named in one place."""

from __future__ import annotations

import ast
import importlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.hf import contract
from fastgen.hf.contract import RELIANCES, Reliance
from tests.configs import build_pair
from tests.modes import MODES, generate

PACKAGE = Path(__file__).parent.parent.parent / "fastgen"
FILES = sorted(PACKAGE.rglob("*.py"))


def found(name: str) -> Any:
    """What a dotted path leads to."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise ImportError(name)


@pytest.mark.parametrize("reliance", RELIANCES, ids=lambda r: r.name)
def test_it_is_there(reliance: Reliance) -> None:
    found(reliance.name)  # raises if it is gone
    assert reliance.use in ("overridden", "mirrored", "called", "read", "subclassed")


def modules_imported(file: Path) -> set[str]:
    """Submodules of transformers that a file names, with the names it takes from them."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_what_a_file_takes_from_inside_of_transformers_is_named(file: Path) -> None:
    named = {reliance.name for reliance in RELIANCES}
    for name in modules_imported(file) - {"transformers.utils.deprecation.deprecate_kwarg"}:
        known = any(n == name or n.startswith(f"{name}.") for n in named)
        assert known, f"{name}: give it a line in RELIANCES of hf/contract.py"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_only_the_contract_asks_for_a_version_of_transformers(file: Path) -> None:
    if file.name == "contract.py":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        compared = isinstance(node, ast.Compare) and "transformers" in ast.unparse(node)
        assert not compared or "__version__" not in ast.unparse(node), ast.unparse(node)


def test_the_installed_version_has_been_met() -> None:
    """A new release goes into `contract.MET` once the suite is green with it."""
    assert contract.is_met(), f"transformers {contract.VERSION} is not in contract.MET"


def test_forward_has_the_parameters_of_the_stock_class() -> None:
    pair = build_pair("t5-1.1")
    stock, fast = (inspect.signature(model.forward) for model in (pair.stock, pair.fast))
    assert list(stock.parameters) == list(fast.parameters)
    assert contract.CACHE in fast.parameters


@pytest.mark.parametrize("mode", ["greedy", "beam sample", "continued", "prompt lookup", "scores"])
@pytest.mark.parametrize("fast_loop", [True, False])
def test_no_warning_where_stock_has_none(mode: str, fast_loop: bool) -> None:
    model: Any = build_pair("t5-1.1").fast
    kept = model.engine_options
    model.engine_options = {"fast_loop": fast_loop}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            generate(model, "t5-1.1", MODES[mode].arguments(model, "t5-1.1"))
    finally:
        model.engine_options = kept


@pytest.mark.skipif(contract.CACHE == "past_key_values", reason="a version with one name")
@torch.no_grad()
def test_the_older_name_of_a_kv_cache_is_taken_as_stock_takes_it() -> None:
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(3))
    pair = build_pair("t5-1.1")
    logits = []
    for model in (pair.stock, pair.fast):
        first = model(input_ids=ids, decoder_input_ids=ids[:, :2], use_cache=True)
        with pytest.warns(FutureWarning, match="past_key_values"):
            second = model(
                encoder_outputs=(first.encoder_last_hidden_state,),
                decoder_input_ids=ids[:, 2:3],
                past_key_values=first.cache,
            )
        logits.append(second.logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=5e-4)
