"""``fastgen doctor``: the choice of an engine in every situation of a machine, and the report."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgen import EngineOptions, FastT5, doctor, runtime
from fastgen.doctor import EngineChoice, choices, picked
from fastgen.engine_cache import Artifact, EngineCache
from fastgen.errors import FastgenError, MissingRuntimeError, OptionError
from tests.configs import build_pair

NO_GPU = "torch 2.13.0 (CUDA 13.0) finds no NVIDIA GPU or driver"
NOT_INSTALLED = 'ONNX Runtime is not installed. Run: pip install "fastgen[cpu]"'
NO_TENSORRT = 'tensorrt is not installed. Run: pip install "fastgen[tensorrt]"'
CPU_BUILD = "the installed ONNX Runtime 1.31.1 is a CPU build."


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    gpu: str | None = None,
    onnxruntime: str | None = None,
    cuda_provider: str | None = None,
    tensorrt: str | None = NO_TENSORRT,
) -> None:
    """Imitate a machine by its problems; None where all is well."""

    def module() -> SimpleNamespace:
        if onnxruntime:
            raise MissingRuntimeError(onnxruntime)
        return SimpleNamespace(__version__="1.31.1")

    monkeypatch.setattr(doctor, "_cuda_problem", lambda: gpu)
    monkeypatch.setattr(runtime, "onnxruntime", module)
    monkeypatch.setattr(runtime, "cuda_provider_problem", lambda: cuda_provider)

    def backend_problem(name: str, device: str) -> FastgenError | None:
        problem = onnxruntime if name == "onnxruntime" else tensorrt
        return MissingRuntimeError(problem) if problem else None

    monkeypatch.setattr(doctor, "_backend_problem", backend_problem)


@pytest.mark.parametrize(
    ("problems", "on_cuda", "on_cpu"),
    [
        ({}, "onnxruntime", "onnxruntime"),
        ({"gpu": NO_GPU}, None, "onnxruntime"),
        ({"cuda_provider": CPU_BUILD}, None, "onnxruntime"),
        ({"onnxruntime": NOT_INSTALLED}, None, None),
        ({"gpu": NO_GPU, "onnxruntime": NOT_INSTALLED}, None, None),
    ],
)
def test_choice_by_machine(
    monkeypatch: pytest.MonkeyPatch,
    problems: dict[str, str],
    on_cuda: str | None,
    on_cpu: str | None,
) -> None:
    machine(monkeypatch, **problems)
    found = choices(EngineOptions())
    assert [(choice.name, choice.device) for choice in found] == [
        ("onnxruntime", "cuda"),
        ("torch", "cuda"),
        ("tensorrt", "cuda"),
        ("tensorrt-rtx", "cuda"),
        ("onnxruntime-tensorrt", "cuda"),
        ("onnxruntime", "cpu"),
        ("torch", "cpu"),
    ]
    for device, expected in (("cuda", on_cuda), ("cpu", on_cpu)):
        choice = picked(device, found)
        assert (choice and choice.name) == expected
    # Whatever is not available says which of the machine's problems is to blame.
    engines = [choice for choice in found if choice.name != "torch" or "gpu" in problems]
    reasons = {c.reason for c in engines if not c.available and "EngineOptions" not in c.reason}
    expected = {"tensorrt": NO_TENSORRT, **problems}
    assert reasons == set(expected.values()) - (
        {CPU_BUILD, NO_TENSORRT} if "gpu" in problems else set()
    )


def test_tensorrt_is_picked_where_the_options_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tensorrt=None)
    found = choices(EngineOptions())
    best = picked("cuda", found)
    assert best is not None and best.name == "onnxruntime"
    for name in doctor.ON_REQUEST:
        found = choices(EngineOptions(backend=name))  # type: ignore[arg-type]
        best = picked("cuda", found)
        assert best is not None and best.name == name and repr(name) in best.reason
        on_cpu = next(c for c in found if c.device == "cpu" and c.name == "onnxruntime")
        assert not on_cpu.available and "NVIDIA" in on_cpu.reason


def test_missing_tensorrt_leaves_nothing_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    found = choices(EngineOptions(backend="tensorrt"))
    assert picked("cuda", found) is None
    assert found[0].name == "tensorrt" and found[0].reason == NO_TENSORRT and found[0].raises
    assert (
        found[2].name == "torch" and "only with EngineOptions(backend='torch')" in found[2].reason
    )


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (EngineOptions(), torch.float32),
        (EngineOptions(), torch.bfloat16),
        (EngineOptions(backend="torch"), torch.float32),
        (EngineOptions(backend="tensorrt"), torch.float32),
    ],
    ids=["missing", "dtype", "torch", "another"],
)
def test_without_onnxruntime_a_model_does_what_is_said(
    monkeypatch: pytest.MonkeyPatch, options: EngineOptions, dtype: torch.dtype
) -> None:
    runtime.onnxruntime.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    *_, onnxruntime, torch_choice = choices(options)
    model = FastT5(build_pair("t5-1.1").fast.config, engine_options=options).to(dtype).eval()
    ids = torch.ones(1, 3, dtype=torch.int64)
    try:
        if onnxruntime.raises:
            assert picked("cpu", [onnxruntime, torch_choice]) is None
            with pytest.raises(MissingRuntimeError) as error:
                model.generate(ids, max_new_tokens=2)
            assert str(error.value) == onnxruntime.reason
        else:
            assert model.explain(input_ids=ids).path == "torch"
            assert torch_choice.available or options.backend == "tensorrt"
            model.generate(ids, max_new_tokens=2)
    finally:
        runtime.onnxruntime.cache_clear()


def test_reason_of_an_available_engine_names_version_and_dtypes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch)
    cuda, *_, cpu, reserve = choices(EngineOptions())
    assert cuda.reason == "ONNX Runtime 1.31.1, for models in float32, float16, bfloat16"
    assert cpu.reason == cuda.reason + ", computed in float32"
    assert reserve.reason == f"torch {runtime.versions()['torch']}, in every dtype"


def test_options_can_rule_the_engine_out(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    for found in (choices(EngineOptions(backend="torch")), _choices_by_environment(monkeypatch)):
        assert [c.available for c in found if c.name in doctor.ENGINES] == [
            False,
            True,
            False,
            True,
        ]
        assert "backend='torch'" in found[0].reason
        best = picked("cpu", found)
        assert best is not None and best.name == "torch"


def _choices_by_environment(monkeypatch: pytest.MonkeyPatch) -> list[EngineChoice]:
    monkeypatch.setenv("FASTGEN_ENGINE_OPTIONS", "backend=torch")
    return choices()


def test_unknown_option_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_ENGINE_OPTIONS", "bakend=torch")
    with pytest.raises(OptionError, match="'backend'"):
        choices()


def test_torch_that_does_not_import_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = choices(EngineOptions())
    assert len(found) == 7 and not any(choice.available for choice in found)
    assert all("torch does not import" in choice.reason for choice in found)


@pytest.mark.parametrize(
    ("cuda_version", "words"), [(None, "build without CUDA"), ("13.0", "finds no NVIDIA GPU")]
)
def test_missing_gpu_is_told_from_a_cpu_build_of_torch(
    monkeypatch: pytest.MonkeyPatch, cuda_version: str | None, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    assert words in choices(EngineOptions())[0].reason


def test_this_machine_serves_a_model_on_the_cpu() -> None:
    choice = picked("cpu", choices(EngineOptions()))
    assert choice is not None and choice.name == "onnxruntime"
    assert importlib.import_module("onnxruntime").__version__ in choice.reason


def test_report_of_a_cpu_machine(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine_cache_folder: Path,
) -> None:
    machine(monkeypatch, gpu=NO_GPU)
    EngineCache().load_or_build({}, lambda: Artifact(b"x" * 2_000_000, {}), title="step")
    assert doctor.report() is True
    output = capsys.readouterr().out
    for package, version in runtime.versions().items():
        assert package in output and (version or "-") in output
    assert f"onnxruntime on cuda: no: {NO_GPU}\n" in output
    assert "onnxruntime on cpu: picked: ONNX Runtime 1.31.1, for models in float32, " in output
    assert "torch on cpu: in reserve: " in output
    assert f"engine cache: {engine_cache_folder}, 1 compiled, 2.0 MB\n" in output
    assert "Picked on this machine: onnxruntime on cpu." in output


def test_report_without_an_engine_keeps_the_command_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, gpu=NO_GPU, onnxruntime=NOT_INSTALLED)
    assert doctor.report() is False
    output = capsys.readouterr().out
    assert f"onnxruntime on cpu: no: {NOT_INSTALLED}\n" in output
    assert "torch on cpu: no: torch" in output
    assert "No engine is picked: models on cpu raise an error" in output


def test_report_where_a_gpu_is_left_without_its_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, cuda_provider=CPU_BUILD)
    monkeypatch.setattr(doctor, "_gpus", lambda: "NVIDIA H200")
    assert doctor.report() is False
    output = capsys.readouterr().out
    assert f"onnxruntime on cuda: no: {CPU_BUILD}\n" in output
    assert "onnxruntime on cpu: picked" in output
    assert "No engine is picked: models on cuda raise an error" in output


def test_report_where_options_ask_for_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, gpu=NO_GPU)
    monkeypatch.setenv("FASTGEN_ENGINE_OPTIONS", "backend=torch")
    assert doctor.report() is False
    assert "No engine is picked: models run no faster than stock torch." in capsys.readouterr().out


def test_report_lists_the_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch)
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert doctor.report() is True
    output = capsys.readouterr().out
    assert output.count("NVIDIA H200, 140 GiB, compute capability 9.0") == 2
    assert "Picked on this machine: onnxruntime on cuda." in output


def test_report_says_when_the_engine_cache_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "file"))
    doctor.report()
    assert f"engine cache: {tmp_path / 'file'} cannot be written" in capsys.readouterr().out
    monkeypatch.setenv("FASTGEN_ENGINE_OPTIONS", "disk_cache=false")
    doctor.report()
    assert "engine cache: switched off" in capsys.readouterr().out
