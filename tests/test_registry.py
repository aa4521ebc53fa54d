"""The registry against the classes themselves."""

import inspect
from pathlib import Path

import pytest

import fastgen
from fastgen import registry
from fastgen.hf.stock import stock_class


@pytest.mark.parametrize("model_type", registry.FAMILIES)
def test_its_names_are_the_classes_of_the_family(model_type: str) -> None:
    family = registry.FAMILIES[model_type]
    for name in map(family.class_name, family.tasks):
        fast = getattr(fastgen, name)
        assert fast.__qualname__ == f"Fast{stock_class(fast).__name__}" == name
        assert stock_class(fast).config_class.model_type == model_type
        assert inspect.getmodule(fast).__name__ == registry.HOMES[name]


def test_every_file_of_a_family_has_its_line() -> None:
    models = Path(fastgen.__file__).parent / "models"
    files = {file.stem for file in models.glob("*.py") if "\nclass Fast" in file.read_text()}
    assert files == set(registry.FAMILIES)


def test_every_auto_class_has_some_class_to_choose() -> None:
    for auto, tasks in registry.AUTO.items():
        found = registry.classes_for(auto)
        assert found and all(name.endswith(tasks) for name in found.values())
        assert set(found) <= set(registry.FAMILIES)
