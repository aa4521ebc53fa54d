"""Every call that fastgen makes of TensorRT, held against the real bindings of each version; and
what fastgen does where TensorRT refuses."""

import functools
import importlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import EngineOptions
from fastgen.engines import tensorrt_build
from fastgen.engines.tensorrt import TensorRT
from fastgen.engines.tensorrt_build import FLAVOURS, Build
from fastgen.errors import EngineError
from fastgen.graphs.graph import Graph
from fastgen.target import tensorrt as tensorrt_target
from tests.engines import simulated_tensorrt as simulation
from tests.engines.strict_tensorrt import VERSIONS, Module
from tests.engines.tensorrt_signatures import describe
from tests.engines.test_tensorrt import pair_on_tensorrt
from tests.engines.test_tensorrt_build import recorded
from tests.helpers import refusal, sources

TENSORRT = [version for version in VERSIONS if "rtx" not in version]
CPU = torch.device("cpu")
FOREIGN = b"another device:its timings"


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Module:
    return simulation.machine(monkeypatch, request.param)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def backend(trt: Module) -> str:
    """The name of the backend that these bindings are of."""
    return "tensorrt-rtx" if hasattr(trt, "ComputeCapability") else "tensorrt"


@functools.cache
def encoder_graph() -> Graph:
    return recorded("t5-1.1", "float32")[0]["encoder"]


def build(trt: Module, timings: bytes = b"", **options: Any) -> tuple[bytes, bytes]:
    options = {"disk_cache": False, **options}
    wanted = Build(FLAVOURS[backend(trt)], (8, 9), EngineOptions(**options), False)
    return tensorrt_build.build_plan(encoder_graph(), wanted, "encoder", timings)


def encode(trt: Module, **options: Any) -> torch.Tensor:
    pair = pair_on_tensorrt(backend=backend(trt), **options)
    hidden = pair.fast.encoder(input_ids=sources()).last_hidden_state
    assert pair.fast.encoder.refusal(input_ids=sources()) is None
    expected = pair.stock.encoder(input_ids=sources()).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    return hidden


# Every call is one of the real bindings


def test_the_versions_are_the_ends_of_what_is_supported() -> None:
    assert VERSIONS == ["tensorrt-10.15.1.29", "tensorrt-11.4.0.106", "tensorrt-rtx-1.7.1.116"]
    for version in VERSIONS:
        name, _, number = version.rpartition("-")
        found = tuple(int(part) for part in number.split(".")[:2])
        assert FLAVOURS[name].lowest <= found < FLAVOURS[name].below


def test_building_and_running_call_the_bindings_as_they_are(trt: Module, tmp_path: Path) -> None:
    for beams in (1, 2):  # builds, then finds what the first one left
        pair = pair_on_tensorrt(
            backend=backend(trt), disk_cache=True, cache_dir=tmp_path, build_memory_mb=64
        )
        arguments = {"inputs": sources(), "max_new_tokens": 3, "num_beams": beams}
        assert torch.equal(pair.fast.generate(**arguments), pair.stock.generate(**arguments))
        assert refusal(pair.fast) is None
    kind = "kernels" if backend(trt) == "tensorrt-rtx" else "timings"
    assert list(tmp_path.glob(f"{backend(trt)}-{trt.__version__}-sm89-NVIDIA-L4-58.{kind}"))


def test_a_refused_node_is_named(trt: Module) -> None:
    onnx = encoder_graph().onnx.replace(b"Reshape", b"Reshaqe")
    logger = tensorrt_build.make_logger(trt)
    with pytest.raises(EngineError, match=r"node \d+ .*\(Reshaqe\): no importer"):
        tensorrt_build.parse(trt, logger, replace(encoder_graph(), onnx=onnx))


def test_a_build_that_takes_too_long_is_given_up(
    trt: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(10**6))
    monkeypatch.setattr(tensorrt_build.time, "monotonic", lambda: float(next(times)))
    with pytest.raises(EngineError, match="build_seconds=1"):
        build(trt, build_seconds=1)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_strict_module_refuses_what_the_bindings_lack(version: str) -> None:
    trt: Any = Module(version, simulation)
    with pytest.raises(AssertionError, match=r"lacks ILogger\.log"):
        type("Logger", (trt.ILogger,), {})
    logger = tensorrt_build.make_logger.__wrapped__(trt)
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    with pytest.raises(AttributeError, match="Builder has no build_cuda_engine"):
        builder.build_cuda_engine(None, config)
    with pytest.raises(TypeError, match="set_timing_cache"):
        config.set_timing_cache(config.create_timing_cache(b""))
    with pytest.raises(TypeError, match="ignore"):
        config.set_timing_cache(config.create_timing_cache(b""), ignore=False)
    with pytest.raises(TypeError, match="set_memory_pool_limit"):
        config.set_memory_pool_limit(0, 2**20)
    with pytest.raises(TypeError, match="takes int"):
        config.builder_optimization_level = "3"
    with pytest.raises(AttributeError, match="max_workspace_size"):
        config.max_workspace_size = 2**20
    with pytest.raises(AttributeError, match="FP16_ACCUMULATE"):
        config.set_flag(trt.BuilderFlag.FP16_ACCUMULATE)
    if "rtx" not in version:
        with pytest.raises(AttributeError, match="IRuntimeConfig has no create_runtime_cache"):
            trt.IRuntimeConfig._wrap(simulation.RuntimeConfig()).create_runtime_cache()


@pytest.mark.parametrize("version", VERSIONS)
def test_signatures_are_those_of_the_installed_bindings(version: str) -> None:
    name, _, number = version.rpartition("-")
    try:
        module: Any = importlib.import_module(name.replace("-", "_"))
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"no bindings of {name} here: {error}")
    if module.__version__ != number:
        pytest.skip(f"{name} {module.__version__} is installed, not {number}")
    assert describe(module)["classes"] == Module(version, simulation)._classes


# Where TensorRT refuses


@pytest.mark.parametrize("version", TENSORRT)
@pytest.mark.parametrize("timings", [FOREIGN, b"damaged"])
def test_timings_that_tensorrt_refuses_are_replaced(
    version: str, timings: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = simulation.machine(monkeypatch, version)
    assert build(trt, timings) == (build(trt)[0], b"device:+")
    assert build(trt, b"device:+")[1] == b"device:++"  # and those of this device grow
    assert tensorrt_build.make_logger(trt).take("nothing") == "nothing"


@pytest.mark.parametrize("version", TENSORRT)
@pytest.mark.parametrize("call", ["create_timing_cache", "set_timing_cache", "serialize"])
def test_without_a_timing_cache_plans_are_built_all_the_same(
    version: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = simulation.machine(monkeypatch, version)
    owner = simulation.TimingCache if call == "serialize" else simulation.Config
    answer = False if call == "set_timing_cache" else None
    monkeypatch.setattr(owner, call, lambda *_, **__: answer)
    plan, timings = build(trt)
    assert plan and not timings


@pytest.mark.parametrize("kind", [simulation.Builder, simulation.OnnxParser, simulation.Runtime])
def test_what_cannot_be_made_is_an_error_of_the_engine(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *_: Any, logger: Any = None, **__: Any) -> None:
        simulation.error(logger, "CUDA initialization failure")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(kind, "__init__", refuse)
    with pytest.raises(EngineError, match="CUDA initialization failure"):
        encode(simulation.machine(monkeypatch, TENSORRT[0]))


def test_a_refused_profile_is_named(trt: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation.Config, "add_optimization_profile", lambda *_, **__: -1)
    with pytest.raises(EngineError, match="refuses the profile"):
        build(trt)


def test_unknown_scratch_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: simulation.Context) -> int:
        self.engine.fail("shapes are missing")
        return 0

    monkeypatch.setattr(simulation.Context, "update_device_memory_size_for_shapes", fail)
    with pytest.raises(EngineError, match="shapes are missing"):
        encode(simulation.machine(monkeypatch, TENSORRT[0]))


def test_scratch_memory_of_no_bytes_is_that_of_the_profile(
    trt: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation.Context, "update_device_memory_size_for_shapes", lambda _: 0)
    encode(trt)  # the simulation refuses to run with less than it needs


def test_kernels_that_cannot_be_kept_are_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trt = simulation.machine(monkeypatch)
    for owner, call, answer in (
        (simulation.RuntimeCache, "serialize", None),
        (simulation.RuntimeConfig, "set_runtime_cache", False),
        (simulation.RuntimeConfig, "create_runtime_cache", None),
    ):
        monkeypatch.setattr(owner, call, lambda *_, answer=answer, **__: answer)
        encode(trt, disk_cache=True, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.kernels"))


def test_a_plan_that_tensorrt_refuses_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = simulation.machine(monkeypatch, TENSORRT[0])
    kept = {"disk_cache": True, "cache_dir": tmp_path}
    monkeypatch.setattr(simulation, "DEVICE", "another device")  # of the same name, say
    encode(trt, **kept)
    monkeypatch.setattr(simulation, "DEVICE", "device")
    with pytest.warns(RuntimeWarning, match="is built again: .* damaged or of another device"):
        encode(trt, **kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        encode(trt, **kept)


def test_a_plan_that_tensorrt_never_loads_is_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt, built = simulation.machine(monkeypatch, TENSORRT[0]), []
    plan = simulation.Builder.build_serialized_network

    def count(*arguments: Any, **named: Any) -> Any:
        built.append(1)
        return plan(*arguments, **named)

    monkeypatch.setattr(simulation.Builder, "build_serialized_network", count)
    monkeypatch.setattr(simulation.Runtime, "deserialize_cuda_engine", lambda *_, **__: None)
    remedy = re.escape("EngineOptions(backend='onnxruntime')")
    with pytest.raises(EngineError, match=remedy):
        encode(trt, disk_cache=True, cache_dir=tmp_path)
    assert len(built) == 1


def test_plans_and_timings_are_kept_for_one_model_of_gpu(
    trt: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An H100 and an H200 share a compute capability, for which TensorRT for RTX builds."""
    engine, keys, files = TensorRT(backend(trt)), [], []
    options = EngineOptions(cache_dir=tmp_path)
    for name, processors in (("NVIDIA H100", 132), ("NVIDIA H200", 132), ("NVIDIA H100", 16)):
        simulation.gpu(monkeypatch, (9, 0), name, processors)
        keys.append(engine.key(tensorrt_target("float16", backend(trt)), options, CPU)["gpu"])
        files.append(engine._side_file(options, CPU, "timings")._path)
    assert len(set(files)) == 3
    models = {"sm90-NVIDIA-H100-132", "sm90-NVIDIA-H200-132", "sm90-NVIDIA-H100-16"}
    assert set(keys) == ({"sm90"} if backend(trt) == "tensorrt-rtx" else models)


def test_a_failed_build_says_why(trt: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, **_: Any) -> None:
        simulation.error(self.logger, "no implementation of Gemm_10")

    monkeypatch.setattr(simulation.Builder, "build_serialized_network", fail)
    with pytest.raises(EngineError, match="did not build encoder: no implementation of Gemm_10"):
        build(trt)
