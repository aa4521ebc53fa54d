"""The TensorRT engine over a stand-in for TensorRT's runtime: bindings, contexts and errors.

What runs on a GPU is TensorRT's own; here it is found that it is given the right tensors.
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgen.engines import NoEngine, tensorrt, tensorrt_build
from fastgen.engines.tensorrt import TensorRT
from fastgen.errors import EngineError, MissingRuntimeError
from tests.configs import Pair, build_pair
from tests.engines import simulated_tensorrt
from tests.helpers import CLOSE, refusal, sources, targets, tokens


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU of compute capability 8.9, as far as the TensorRT engine sees."""
    simulated_tensorrt.machine(monkeypatch)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def pair_on_tensorrt(variant: str = "t5-1.1", **options: Any) -> Pair:
    pair = copy.deepcopy(build_pair(variant))
    pair.fast.engine_options = {"backend": "tensorrt-rtx", "disk_cache": False, **options}
    return pair


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy over several buckets": {"max_new_tokens": 70, "min_new_tokens": 70},
    "prefill": {"decoder_input_ids": tokens(3, 4, seed=5)},
    "beams": {"num_beams": 3},
    "beams of the HF loop": {"num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["t5-1.0", "t5-1.1", "umt5"])
def test_tokens_are_the_stock_models(simulated: None, variant: str, mode: str) -> None:
    pair = pair_on_tensorrt(variant, fast_loop="HF loop" not in mode)
    arguments = {"inputs": sources(), "max_new_tokens": 12, **MODES[mode]}
    arguments["attention_mask"] = torch.ones_like(sources())
    arguments["attention_mask"][1, 5:] = 0
    expected = pair.stock.generate(**arguments)
    assert torch.equal(pair.fast.generate(**arguments), expected)
    assert refusal(pair.fast) is None
    runs = pair.fast.encoder._engine.engine._engine._real.runs
    assert runs > 0, "the engine did not run"


def test_engines_read_the_parameters_of_the_model(simulated: None) -> None:
    pair = pair_on_tensorrt()
    pair.fast.compile_engine()
    own = {p.data_ptr() for p in pair.fast.parameters()}
    decoder = pair.fast._engine
    for engine in (pair.fast.encoder._engine.engine, decoder.cross, decoder.decoder(False, 64)):
        assert set(engine.weight_pointers().values()) <= own


def test_an_edited_weight_is_seen_at_once(simulated: None) -> None:
    pair = pair_on_tensorrt(prepack=0)  # an option of the CPU, where this GPU is imitated
    call = {"input_ids": sources(), "decoder_input_ids": targets()[:, :1]}
    pair.fast(**call)
    engine = pair.fast._engine
    for model in (pair.fast, pair.stock):
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(pair.fast(**call).logits, pair.stock(**call).logits, **CLOSE)
    assert pair.fast._engine is engine


def test_a_context_serves_one_binding_after_the_other(simulated: None) -> None:
    pair = pair_on_tensorrt()
    for length in (3, 9, 5):
        pair.fast.encoder(input_ids=tokens(2, length, seed=length))
    assert pair.fast.encoder._engine.engine._engine._real.contexts == 1


def test_scratch_memory_is_shared(simulated: None) -> None:
    pair = pair_on_tensorrt()
    pair.fast.generate(sources(), max_new_tokens=3)
    assert len(tensorrt._scratches) == 1


def test_sizes_beyond_the_options_are_served_by_torch(simulated: None) -> None:
    pair = pair_on_tensorrt(max_batch=4, max_source_tokens=16)
    for ids, option in ((tokens(5, 9, seed=1), "max_batch=4"), (tokens(2, 17, seed=1), "=16")):
        assert option in pair.fast.encoder.refusal(input_ids=ids)
        assert option in str(pair.fast.explain(inputs=ids))
        expected = pair.stock.generate(ids, max_new_tokens=5)
        assert torch.equal(pair.fast.generate(ids, max_new_tokens=5), expected)


def test_explain_counts_beams(simulated: None) -> None:
    model = pair_on_tensorrt(max_batch=4).fast
    assert model.explain(inputs=tokens(2, 9, seed=1), num_beams=2).path == "fast loop"
    for beams in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        explanation = model.explain(inputs=tokens(2, 9, seed=1), **beams)
        assert explanation.path == "torch" and "max_batch=4" in str(explanation)


def test_a_binding_beyond_every_profile_names_the_options(simulated: None) -> None:
    pair = pair_on_tensorrt(max_batch=2)
    pair.fast.compile_engine()
    hidden = torch.zeros(3, 5, pair.fast.config.d_model)
    with pytest.raises(EngineError, match="max_batch"):
        pair.fast._engine.cross.bind(
            {"encoder_hidden_states": hidden, "attention_mask": torch.ones(3, 5).long()}
            | {spec.name: hidden for spec in pair.fast._engine.cross.graph.outputs}
        )


def test_tensors_at_odd_addresses_are_copied_before_each_run(
    simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_on_tensorrt()
    ids = tokens(3, 9, seed=4)
    expected = pair.fast.encoder(input_ids=ids).last_hidden_state
    monkeypatch.setattr(tensorrt, "ALIGNMENT", 64)
    memory = torch.zeros(ids.numel() + 1, dtype=torch.int64)
    odd = memory[1:].view(ids.shape).copy_(ids)
    assert odd.data_ptr() % 64
    found = pair.fast.encoder(input_ids=odd).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_failures_carry_what_tensorrt_said(
    simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_on_tensorrt()
    monkeypatch.setattr(simulated_tensorrt, "SCRATCH", 2**60)
    monkeypatch.setattr(tensorrt, "_scratch", lambda device, size: torch.empty(16))
    with pytest.raises(EngineError, match="too little device memory"):
        pair.fast.encoder(input_ids=sources())


def test_kernels_compiled_at_run_time_are_kept(simulated: None, tmp_path: Path) -> None:
    pair = pair_on_tensorrt(disk_cache=True, cache_dir=tmp_path)
    pair.fast.encoder(input_ids=sources())
    assert (
        tmp_path / "tensorrt-rtx-1.7.1.116-sm89-NVIDIA-L4-58.kernels"
    ).read_bytes() == b"kernels"


def test_the_next_process_finds_the_plans(
    simulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair_on_tensorrt(disk_cache=True, cache_dir=tmp_path).fast.compile_engine()

    def build_again(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(tensorrt_build, "build_plan", build_again)
    fast: Any = pair_on_tensorrt(disk_cache=True, cache_dir=tmp_path).fast
    fast.compile_engine()
    for changed in ({"max_batch": 7}, {"build_level": 1}, {"min_bucket": 32}):
        fast = pair_on_tensorrt(disk_cache=True, cache_dir=tmp_path, **changed).fast
        with pytest.raises(AssertionError, match="built again"):
            fast.compile_engine()
    simulated_tensorrt.gpu(monkeypatch, capability=(12, 0))
    with pytest.raises(AssertionError, match="built again"):
        pair_on_tensorrt(disk_cache=True, cache_dir=tmp_path).fast.compile_engine()


def test_a_gpu_that_tensorrt_for_rtx_refuses_is_left_to_torch(
    simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated_tensorrt.gpu(monkeypatch, capability=(9, 0))
    pair = pair_on_tensorrt()
    assert "compute capability 9.0" in str(refusal(pair.fast))
    with pytest.raises(NoEngine, match="backend='tensorrt'"):
        TensorRT("tensorrt-rtx").check(torch.device("cpu"))


def test_a_missing_library_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_build.load.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingRuntimeError, match=r'pip install "fastgen\[tensorrt\]"'):
        tensorrt_build.load(tensorrt_build.FLAVOURS["tensorrt"])


@pytest.mark.parametrize("version", ["10.14.1.48", "12.0.0"])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    module = SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    tensorrt_build.load.cache_clear()
    with pytest.raises(MissingRuntimeError, match=r"10\.15 up to, not including, 12\.0"):
        tensorrt_build.load(tensorrt_build.FLAVOURS["tensorrt"])
