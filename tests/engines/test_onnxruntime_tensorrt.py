"""ONNX Runtime's TensorRT provider, as far as a machine without one can tell."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgen import EngineOptions, cuda, runtime
from fastgen.engines import choice, onnxruntime, onnxruntime_tensorrt
from fastgen.engines.onnxruntime import OnnxRuntimeEngine
from fastgen.engines.recording import Recorder
from fastgen.errors import MissingRuntimeError
from fastgen.target import onnxruntime_tensorrt as provider_target
from tests.configs import build_pair
from tests.engines.simulated_tensorrt import gpu

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def engine_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(cuda, "engine_stream", lambda device: stream)
    gpu(monkeypatch, (9, 0), "NVIDIA H200", 132)


def module(monkeypatch: pytest.MonkeyPatch, providers: list[str], tensorrt: Any) -> None:
    fake = SimpleNamespace(__version__="1.31.1", get_available_providers=lambda: providers)
    monkeypatch.setattr(runtime, "onnxruntime", lambda: fake)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)


@pytest.mark.parametrize(
    ("providers", "tensorrt", "message"),
    [
        ([], None, "has no TensorrtExecutionProvider"),
        (["TensorrtExecutionProvider"], None, "does not import"),
        (["TensorrtExecutionProvider"], "11.4.0", "needs TensorRT 10; 11.4.0 is installed"),
    ],
)
def test_what_is_missing_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, providers: list[str], tensorrt: str | None, message: str
) -> None:
    fake = None if tensorrt is None else SimpleNamespace(__version__=tensorrt)
    module(monkeypatch, providers, fake)
    with pytest.raises(MissingRuntimeError, match=message) as error:
        choice.backend("onnxruntime-tensorrt").check(DEVICE)
    assert 'pip install "fastgen[onnxruntime-tensorrt]"' in str(error.value)


def test_a_machine_with_both_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = SimpleNamespace(__version__="10.16.1.11")
    module(monkeypatch, ["TensorrtExecutionProvider"], tensorrt)
    choice.backend("onnxruntime-tensorrt").check(DEVICE)


@pytest.mark.parametrize(
    ("dtype", "flags"), [("float16", "10"), ("bfloat16", "01"), ("float32", "00")]
)
def test_provider_options(engine_stream: None, tmp_path: Path, dtype: str, flags: str) -> None:
    options = EngineOptions(cache_dir=tmp_path, build_memory_mb=3, build_level=5)
    name, settings = onnxruntime_tensorrt.provider(provider_target(dtype), DEVICE, options)
    assert name == "TensorrtExecutionProvider"
    model = "sm90-NVIDIA-H200-132"  # the provider's own names say sm90
    folder = str(tmp_path / "onnxruntime-tensorrt" / model / "level-5-memory-3")
    assert settings == {
        "device_id": "1",
        "user_compute_stream": "77",
        "trt_fp16_enable": flags[0],
        "trt_bf16_enable": flags[1],
        "trt_builder_optimization_level": "5",
        "trt_max_workspace_size": str(3 * 2**20),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }


def test_without_the_engine_cache_nothing_is_stored(engine_stream: None) -> None:
    options = EngineOptions(disk_cache=False)
    _, settings = onnxruntime_tensorrt.provider(provider_target("float16"), DEVICE, options)
    assert not any("cache" in name for name in settings)


def test_what_tensorrt_does_not_take_goes_to_cuda(engine_stream: None) -> None:
    target = provider_target("float16")
    names = [name for name, _ in onnxruntime._providers(target, DEVICE, EngineOptions())]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]


def test_weights_are_inputs_and_the_partition_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build_pair("t5-1.1").fast
    target = replace(provider_target("float32"), device="cpu")
    recorder = Recorder()
    monkeypatch.setattr(choice, "backend", lambda name: recorder)
    model.encoder._build_engine(target)
    parameters = dict(model.encoder.named_parameters(remove_duplicate=False))
    engine = OnnxRuntimeEngine(recorder.graphs["encoder"], target, parameters, EngineOptions())
    pointers = {name: parameters[name].data_ptr() for name in engine.graph.parameters}
    assert engine.weight_pointers() == pointers
    ids, positions = torch.randint(3, 50, (2, 7)), torch.arange(7)
    hidden = torch.empty(2, 7, model.config.d_model)
    tensors = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "query_positions": positions[:, None],
        "key_positions": positions[None, :],
        "last_hidden_state": hidden,
    }
    engine.bind(tensors).run()
    with torch.no_grad():
        expected = build_pair("t5-1.1").stock.encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    partition = engine.partition()
    assert list(partition) == ["CPUExecutionProvider"]
    assert partition["CPUExecutionProvider"]["Softmax"] == model.config.num_layers
