"""The installed runtimes: versions, the import of ONNX Runtime, and the commands that mend it."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from fastgen import runtime
from fastgen.errors import FastgenError, MissingRuntimeError


@pytest.fixture(autouse=True)
def fresh_runtime() -> Iterator[None]:
    """What ``runtime`` remembers of this process is forgotten before and after each test."""
    runtime.onnxruntime.cache_clear()
    runtime.cuda_provider_problem.cache_clear()
    yield
    runtime.onnxruntime.cache_clear()
    runtime.cuda_provider_problem.cache_clear()


class FakeOnnxRuntime(SimpleNamespace):
    """Stands for a build of ONNX Runtime with the given execution providers."""

    def __init__(self, listed: list[str], loading: list[str], cuda_version: str = "13.0") -> None:
        super().__init__(__version__="1.31.1", cuda_version=cuda_version, preloads=[])
        self.listed, self.loading = listed, loading

    def get_available_providers(self) -> list[str]:
        return self.listed

    def preload_dlls(self, directory: str | None = None) -> None:
        self.preloads.append(directory)

    def InferenceSession(self, model: bytes, providers: list[str]) -> SimpleNamespace:
        assert providers == ["CUDAExecutionProvider"]
        # Checked by the real one: the model must run.
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return SimpleNamespace(get_providers=lambda: self.loading)


CPU_BUILD = (["CPUExecutionProvider"], ["CPUExecutionProvider"])
CUDA_BUILD = (["CUDAExecutionProvider", "CPUExecutionProvider"],) * 2
CUDA_BUILD_WITHOUT_LIBRARIES = (CUDA_BUILD[0], ["CPUExecutionProvider"])


def install(monkeypatch: pytest.MonkeyPatch, build: tuple[list[str], list[str]]) -> FakeOnnxRuntime:
    fake = FakeOnnxRuntime(*build)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return fake


def test_versions_are_those_of_the_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = runtime.versions()
    assert versions["transformers"] == importlib.metadata.version("transformers")
    assert versions["torch"] == importlib.metadata.version("torch")
    assert (versions["onnxruntime"] or versions["onnxruntime-gpu"]) == onnxruntime.__version__
    assert list(versions)[-1] == "ctranslate2"
    assert torch.__version__.startswith(str(versions["torch"]).split("+")[0])
    assert transformers.__version__ == versions["transformers"]

    def nothing_installed(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", nothing_installed)
    assert set(runtime.versions().values()) == {None}


def test_onnxruntime_is_the_module() -> None:
    assert runtime.onnxruntime() is onnxruntime


@pytest.mark.parametrize(("cuda", "extra"), [(False, "cpu"), (True, "cuda")])
def test_both_packages_installed_is_an_error_with_the_command_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, extra: str
) -> None:
    monkeypatch.setattr(runtime, "_folder", lambda package: "/site-packages")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(MissingRuntimeError) as caught:
        runtime.onnxruntime()
    command = f'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "fastgen[{extra}]"'
    assert str(caught.value).endswith(f"Run: {command}")


def test_a_package_further_down_the_path_is_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_folder", lambda package: f"/{package}")
    assert runtime.onnxruntime() is onnxruntime


@pytest.mark.parametrize(("cuda", "extra"), [(False, "cpu"), (True, "cuda")])
def test_missing_runtime_names_the_command_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(MissingRuntimeError) as caught:
        runtime.onnxruntime()
    expected = f'ONNX Runtime is not installed. Run: pip install "fastgen[{extra}]"'
    assert str(caught.value) == expected
    assert isinstance(caught.value, FastgenError) and isinstance(caught.value, ImportError)


def test_a_runtime_that_does_not_import_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libonnxruntime.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(MissingRuntimeError, match=r"libonnxruntime\.so.*--force-reinstall"):
        runtime.onnxruntime()


@pytest.mark.parametrize("chosen", [None, "0", "1", ""])
def test_telemetry_is_off_unless_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """Set before the import, which is when it is read."""
    if chosen is None:
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    else:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", chosen)
    seen = []

    def imported(name: str) -> SimpleNamespace:
        seen.append(os.environ["ORT_DISABLE_TELEMETRY"])
        return FakeOnnxRuntime(*CPU_BUILD)

    monkeypatch.setattr(importlib, "import_module", imported)
    runtime.onnxruntime()
    assert seen == ["1" if chosen is None else chosen]


def test_importing_onnxruntime_through_fastgen_starts_no_thread() -> None:
    """But those that NumPy starts."""
    code = (
        "import os, numpy; from fastgen import runtime; "
        "threads = lambda: set(os.listdir('/proc/self/task')); "
        "before = threads(); runtime.onnxruntime(); print(threads() - before)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.stdout == "set()\n", result.stderr


@pytest.mark.parametrize(("build", "preloads"), [(CPU_BUILD, []), (CUDA_BUILD, [""])])
def test_cuda_libraries_are_preloaded_once_for_a_cuda_build(
    monkeypatch: pytest.MonkeyPatch, build: tuple[list[str], list[str]], preloads: list[str]
) -> None:
    fake = install(monkeypatch, build)
    for _ in range(2):
        assert runtime.onnxruntime().preloads is fake.preloads
    assert fake.preloads == preloads


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (CPU_BUILD, ["CPU build", 'pip uninstall -y onnxruntime && pip install "fastgen[cuda]"']),
        (CUDA_BUILD_WITHOUT_LIBRARIES, ["CUDA 13.0", 'pip install "fastgen[cuda]"']),
        (CUDA_BUILD, None),
    ],
)
def test_cuda_provider_problem(
    monkeypatch: pytest.MonkeyPatch, build: tuple[list[str], list[str]], words: list[str] | None
) -> None:
    install(monkeypatch, build)
    problem = runtime.cuda_provider_problem()
    cpu_build = "CUDAExecutionProvider" not in build[0]
    assert runtime.cuda_build_problem() == (problem if cpu_build else None)
    if words is None:
        assert problem is None
    else:
        assert problem is not None and all(word in problem for word in words)


@pytest.mark.cuda
def test_cuda_provider_loads_on_a_gpu_machine() -> None:
    assert runtime.cuda_provider_problem() is None


def test_the_probe_model_computes_the_identity() -> None:
    session = onnxruntime.InferenceSession(
        runtime._identity_model(), providers=["CPUExecutionProvider"]
    )
    assert session.run(None, {"x": np.array([1.5], np.float32)}) == [np.float32(1.5)]


def test_importing_it_loads_no_heavy_library() -> None:
    code = (
        "import sys, fastgen.runtime, fastgen.engine_cache; "
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
