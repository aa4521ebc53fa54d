"""The command line: what each command prints, its exit code, and what it does not import."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import BertConfig, GPT2Config, OPTConfig, T5Config
from typer.testing import CliRunner, Result

import fastgen
from fastgen import doctor
from fastgen.cli import _fast_class, app
from fastgen.engine_cache import Artifact, EngineCache
from fastgen.errors import UnsupportedConfigError
from fastgen.fingerprint import fingerprint
from tests.configs import build_stock
from tests.precision.overflowing import scaled

pytestmark = pytest.mark.usefixtures("engine_cache_folder")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def store(title: str, size: int = 1_500_000, age_days: float = 0) -> str:
    """Put an engine into the engine cache of this test; returns its fingerprint."""
    cache, key = EngineCache(), {"title": title}
    cache.load_or_build(key, lambda: Artifact(b"x" * size, {}), title=title)
    used = time.time() - age_days * 86_400
    os.utime(cache.folder / f"{fingerprint(key)}.bin", (used, used))
    return fingerprint(key)


def titles() -> set[str]:
    return {entry.title for entry in EngineCache().entries()}


def test_list_of_nothing(engine_cache_folder: Path) -> None:
    result = call("cache", "list")
    assert (result.exit_code, result.output) == (
        0,
        f"0 compiled, 0.00 MB in {engine_cache_folder}\n",
    )


def test_list_shows_every_engine(engine_cache_folder: Path) -> None:
    names = [store("[T5] step"), store("prefill", size=250_000)]
    result = call("cache", "list")
    assert result.exit_code == 0
    for text in [name[:12] for name in names] + ["[T5] step", "prefill", "1.50", "0.25"]:
        assert text in result.output
    assert result.output.endswith(f"2 compiled, 1.75 MB in {engine_cache_folder}\n")


def test_folder_of_the_engine_options_wins(
    monkeypatch: pytest.MonkeyPatch, engine_cache_folder: Path
) -> None:
    store("in FASTGEN_CACHE")
    other = engine_cache_folder / "other"
    monkeypatch.setenv("FASTGEN_ENGINE_OPTIONS", f"cache_dir={other}")
    assert call("cache", "list").output == f"0 compiled, 0.00 MB in {other}\n"


def test_verify_tells_good_from_damaged(engine_cache_folder: Path) -> None:
    store("good")
    result = call("cache", "verify")
    assert (result.exit_code, "1 compiled" in result.output) == (0, True)
    damaged = store("damaged")
    os.truncate(engine_cache_folder / f"{damaged}.bin", 7)
    result = call("cache", "verify")
    assert result.exit_code == 1
    assert f"{damaged[:12]}: 7 bytes instead of 1500000" in result.output
    assert call("cache", "prune").exit_code == 0
    assert titles() == {"good"} and call("cache", "verify").exit_code == 0


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], {"new", "middle", "old"}),
        (["--older-than", "10"], {"new", "middle"}),
        (["--max-mb", "3"], {"new", "middle"}),
        (["--older-than", "1", "--max-mb", "100"], {"new"}),
        (["--all"], set()),
    ],
)
def test_prune_keeps_what_the_options_do_not_name(options: list[str], left: set[str]) -> None:
    for title, age_days in (("new", 0), ("middle", 5), ("old", 50)):
        store(title, age_days=age_days)
    result = call("cache", "prune", *options)
    assert result.exit_code == 0 and titles() == left
    assert f"{3 - len(left)} removed" in result.output


def test_prune_reports_what_is_in_use(engine_cache_folder: Path) -> None:
    name = store("busy")
    with FileLock(engine_cache_folder / f"{name}.lock"):
        result = call("cache", "prune", "--all")
    assert result.exit_code == 1 and titles() == {"busy"}
    assert f"1 in use or not removable: {name[:12]}" in result.stderr


@pytest.mark.parametrize("value", ["-1", "1e12", "soon"])
def test_prune_refuses_a_wrong_age(value: str) -> None:
    assert call("cache", "prune", "--older-than", value).exit_code == 2


def test_wrong_options_in_the_environment_are_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTGEN_ENGINE_OPTIONS", "bakend=torch")
    for command in (["doctor"], ["cache", "list"]):
        result = call(*command)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert "Error: Unknown engine option 'bakend'" in result.stderr


@pytest.mark.parametrize(("healthy", "exit_code"), [(True, 0), (False, 1)])
def test_doctor_exit_code_says_whether_an_engine_is_picked(
    monkeypatch: pytest.MonkeyPatch, healthy: bool, exit_code: int
) -> None:
    found = doctor.EngineChoice("onnxruntime", "cpu", healthy, "because")
    monkeypatch.setattr(doctor, "choices", lambda options: [found])
    result = call("doctor")
    assert result.exit_code == exit_code
    state = "picked" if healthy else "no"
    assert f"onnxruntime on cpu: {state}: because\n" in result.output


def test_bench_is_mounted() -> None:
    result = call("bench", "--help")
    assert result.exit_code == 0 and "MODEL" in result.output


class FakeModel:
    """Records how ``fastgen compile`` loads, moves and compiles a model."""

    def __init__(self, disk_cache: bool = True, error: Exception | None = None) -> None:
        self.engine_options = fastgen.EngineOptions(disk_cache=disk_cache)
        self.dtype, self.error = torch.float32, error
        self.calls: list[tuple[Any, ...]] = []

    def from_pretrained(self, *arguments: Any, **keywords: Any) -> "FakeModel":
        self.calls.append(("from_pretrained", *arguments, keywords))
        return self

    def to(self, device: str) -> "FakeModel":
        self.calls.append(("to", device))
        return self

    def compile_engine(self) -> None:
        self.calls.append(("compile_engine",))
        if self.error:
            raise self.error
        if self.engine_options.disk_cache:
            store("T5 step")


def fake_model(monkeypatch: pytest.MonkeyPatch, cuda: bool = False, **keywords: Any) -> FakeModel:
    model = FakeModel(**keywords)
    monkeypatch.setattr("fastgen.cli._fast_class", lambda checkpoint: model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    return model


@pytest.mark.parametrize(
    ("options", "cuda", "device", "dtype"),
    [
        ([], False, "cpu", "auto"),
        ([], True, "cuda", "auto"),
        (["--device", "cpu", "--dtype", "float32"], True, "cpu", "float32"),
        (["--device", "cuda", "--dtype", "bfloat16"], True, "cuda", "bfloat16"),
    ],
)
def test_compile_loads_moves_and_compiles(
    monkeypatch: pytest.MonkeyPatch, options: list[str], cuda: bool, device: str, dtype: str
) -> None:
    store("already there")
    model = fake_model(monkeypatch, cuda)
    result = call("compile", "org/t5", *options)
    assert result.exit_code == 0, result.output
    assert model.calls == [
        ("from_pretrained", "org/t5", {"dtype": dtype}),
        ("to", device),
        ("compile_engine",),
    ]
    assert "org/t5 is compiled for " + device in result.output
    assert "new: T5 step (1.50 MB)" in result.output and "already there" not in result.output


def test_compile_without_the_engine_cache_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_model(monkeypatch, disk_cache=False)
    assert "memory only (disk_cache=False)" in call("compile", "org/t5").output


def test_compile_errors_are_told_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_model(monkeypatch, error=UnsupportedConfigError("T5Config.d_kv=0: ..."))
    result = call("compile", "org/t5")
    assert (result.exit_code, result.stderr) == (1, "Error: T5Config.d_kv=0: ...\n")
    for command in ("compile", "precision"):
        result = call(command, "org/t5", "--device", "cuda")
        assert result.exit_code == 1 and "fastgen doctor" in result.stderr


def test_compile_of_a_real_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    build_stock("t5-1.0").save_pretrained(folder)
    result = call("compile", folder, "--device", "cpu", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert f"{folder} is compiled for cpu in torch.float32" in result.output
    assert "new: " in result.output and titles()
    again = call("compile", folder, "--device", "cpu", "--dtype", "float32")
    assert again.exit_code == 0 and "new: " not in again.output


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ("t5-tiny", "FastT5ForConditionalGeneration"),
        ("gpt2-tiny", "FastGPT2LMHeadModel"),
        ("bart-tiny", "FastBartForConditionalGeneration"),
        ("bert-tiny", "FastBertModel"),
        ("t5-tiny-encoder", "FastT5Stack"),
    ],
)
def test_compile_of_a_shape_with_random_weights(shape: str, name: str) -> None:
    arguments = (f"{shape}@random", "--device", "cpu", "--dtype", "float32")
    result = call("compile", *arguments)
    assert result.exit_code == 0, result.output
    assert f"{shape}@random is compiled for cpu in torch.float32" in result.output
    assert f"new: {name} " in result.output and titles()
    assert "new: " not in call("compile", *arguments).output


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (BertConfig(architectures=["BertForPreTraining"]), "FastBertModel"),
        (T5Config(architectures=["T5ForSomethingElse"]), "FastT5ForConditionalGeneration"),
        (GPT2Config(), "FastGPT2LMHeadModel"),
        (BertConfig(architectures=["BertForMaskedLM"]), "FastBertForMaskedLM"),
        (T5Config(architectures=["FastT5Model"]), "FastT5Model"),
        (OPTConfig(), "FastAutoModel"),
    ],
)
def test_compile_takes_the_class_that_was_saved(tmp_path: Path, config: Any, name: str) -> None:
    config.save_pretrained(tmp_path)
    assert _fast_class(str(tmp_path)) is getattr(fastgen, name)
    result = call("compile", "t5-tinny@random")
    assert result.exit_code == 1 and "Did you mean t5-tiny@random?" in result.stderr


def test_compile_of_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    result = call("compile", tmp_path)
    assert result.exit_code == 1 and result.stderr.startswith("Error: ")


def test_precision_prints_what_is_kept_and_why_and_remembers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder, text = tmp_path / "checkpoint", tmp_path / "lines.txt"
    scaled("gpt2", ".mlp.c_proj.weight", 2e4).save_pretrained(folder)
    result = call("precision", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    told = result.output.replace("\n", " ")
    assert "transformer.h.0.mlp.c_proj" in told and "overflows" in told
    assert "of 25 operations are kept in float32" in told
    assert "Remembered by its weights" in told
    text.write_text("no tokenizer lies beside this checkpoint")
    failed = call("precision", folder, "--device", "cpu", "--text", text)
    assert failed.exit_code == 1 and "holds no token ids" in failed.stderr
    wrong = call("precision", folder, "--device", "cpu", "--bound", "2")
    assert wrong.exit_code == 1 and "bounds between 0 and 1" in wrong.stderr


def test_precision_of_a_model_that_is_not_for_float16_exits_with_1(tmp_path: Path) -> None:
    scaled("bart", ".encoder_attn.k_proj.weight", 2e4).save_pretrained(tmp_path)
    result = call("precision", tmp_path, "--device", "cpu")
    assert result.exit_code == 1
    assert "Not for float16: model.decoder.layers.0.encoder_attn.k_proj gives" in result.output
    assert "Load this model in bfloat16 or float32." in result.output


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.output) == (0, f"fastgen {fastgen.__version__}\n")


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fastgen", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage: fastgen " in result.stdout and "doctor" in result.stdout


def test_cache_commands_do_not_import_heavy_libraries() -> None:
    code = (
        "import sys; from fastgen.cli import app; app(['cache', 'list'], standalone_mode=False); "
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
