"""EngineOptions: merging with the environment variable, and refusing what is not allowed."""

import os
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from fastgen import EngineOptions
from fastgen.errors import OptionError
from fastgen.options import ENVIRONMENT_VARIABLE


def test_defaults_without_environment() -> None:
    assert EngineOptions.resolve() == EngineOptions.resolve({}) == EngineOptions()


def test_options_cannot_change_under_a_compiled_engine() -> None:
    with pytest.raises(FrozenInstanceError):
        EngineOptions().backend = "torch"  # type: ignore[misc]


def test_a_dict_and_the_dataclass_mean_the_same() -> None:
    chosen = {"backend": "torch", "max_cached_graphs": 3}
    assert EngineOptions.resolve(chosen) == EngineOptions(backend="torch", max_cached_graphs=3)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("backed", "backend"),
        ("max_cached_graph", "max_cached_graphs"),
        ("cuda_graph", "cuda_graphs"),
        ("cachedir", "cache_dir"),
        ("fastloop", "fast_loop"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_right_one(wrong: str, right: str) -> None:
    with pytest.raises(OptionError, match=f"{wrong!r}.*Did you mean {right!r}"):
        EngineOptions.resolve({wrong: 1})


def test_a_name_near_to_nothing_is_refused_with_all_names() -> None:
    with pytest.raises(OptionError) as error:
        EngineOptions.resolve({"zzz": 1})
    assert "Did you mean" not in str(error.value)
    assert all(field.name in str(error.value) for field in fields(EngineOptions))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        (
            "backend",
            "tensorflow",
            "'auto', 'onnxruntime', 'tensorrt', 'tensorrt-rtx', 'onnxruntime-tensorrt', 'torch'",
        ),
        (
            "backend",
            ["torch"],
            "'auto', 'onnxruntime', 'tensorrt', 'tensorrt-rtx', 'onnxruntime-tensorrt', 'torch'",
        ),
        ("fast_loop", 1, "bool"),
        ("fast_loop", "true", "bool"),
        ("max_cached_graphs", "8", "int"),
        ("max_cached_graphs", 2.0, "int"),
        ("max_cached_graphs", True, "int"),
        ("max_cached_graphs", 0, "at least 1"),
        ("min_bucket", -4, "1 to 65536"),
        ("min_bucket", 10**9, "1 to 65536"),
        ("prefill_tokens", 0, "at least 1"),
        ("intra_op_threads", 0, "allowed are 1 to "),
        ("intra_op_threads", 100_000, "allowed are 1 to "),
        ("max_batch", 0, "at least 1"),
        ("max_source_tokens", 0, "at least 1"),
        ("build_memory_mb", 0, "at least 1"),
        ("build_seconds", 0, "at least 1"),
        ("build_level", 6, "0 to 5"),
        ("build_level", -1, "0 to 5"),
        ("prepack", 1.5, "0 to 1"),
        ("prepack", -0.1, "0 to 1"),
        ("prepack", float("nan"), "0 to 1"),
        ("prepack", True, "float"),
        ("prepack", "0.5", "float"),
        ("intra_op_threads", "2", "int or None"),
        ("cache_dir", 3, "Path or None"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(OptionError) as error:
        EngineOptions.resolve({name: value})
    assert f"EngineOptions.{name}={value!r}" in str(error.value)
    assert allowed in str(error.value)


def test_threads_are_bounded_by_the_machine_but_64_do_everywhere() -> None:
    most = max(64, 4 * (os.cpu_count() or 1))
    for threads in (1, 64, most):
        assert EngineOptions(intra_op_threads=threads).intra_op_threads == threads
    with pytest.raises(OptionError, match=f"allowed are 1 to {most}"):
        EngineOptions(intra_op_threads=most + 1)


@pytest.mark.parametrize("value", [3, "backend=torch", [("backend", "torch")]])
def test_something_else_than_options_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="expected EngineOptions, a dict or None"):
        EngineOptions.resolve(value)


def test_a_folder_may_be_a_str() -> None:
    assert EngineOptions(cache_dir="engines").cache_dir == Path("engines")  # type: ignore[arg-type]


def test_the_environment_gives_defaults_of_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " backend=torch, cuda_graphs=No,max_cached_graphs=2 ,intra_op_threads=3,cache_dir=e/f,"
    text += "prepack=.5"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
    assert EngineOptions.resolve(None) == EngineOptions(
        backend="torch",
        cuda_graphs=False,
        max_cached_graphs=2,
        intra_op_threads=3,
        prepack=0.5,
        cache_dir=Path("e/f"),
    )


def test_explicit_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "backend=torch,min_bucket=16")
    assert EngineOptions.resolve({"backend": "auto"}) == EngineOptions(min_bucket=16)
    assert EngineOptions.resolve(EngineOptions()) == EngineOptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backend", "not of the form key=value"),
        ("fast_loop=maybe", "fast_loop='maybe': expected true or false"),
        ("min_bucket=many", "min_bucket='many': expected a whole number"),
        ("prepack=head", "prepack='head': expected a number"),
        ("min_bucket=0", "allowed are 1 to 65536"),
        ("max_batch=0", "must be at least 1"),
        ("backends=torch", "Did you mean 'backend'"),
        ("backend=tpu", "allowed are 'auto', 'onnxruntime', 'tensorrt'"),
    ],
)
def test_a_wrong_environment_is_refused(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
    with pytest.raises(OptionError, match=message):
        EngineOptions.resolve(None)
