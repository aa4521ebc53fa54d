"""GPU memory: running out of it, and giving it back."""

import copy
import gc
from typing import Any

import pytest
import torch

from fastgen.cuda_graph import CapturedGraph
from fastgen.hf.contract import CACHE
from tests.gpu.memory import MIB, at_most, used
from tests.gpu.models import DEVICE, cuda_copies, decoded, fast_of, ids, medium_stock

pytestmark = pytest.mark.cuda

SLACK = 64 * MIB  # work spaces of libraries and graph launches, which stay


def generate(model: Any, rows: int, length: int = 32, **arguments: Any) -> torch.Tensor:
    call = {"max_new_tokens": 4, "min_new_tokens": 4, **arguments}
    return model.generate(ids(rows, length, seed=rows), **call)


@pytest.mark.parametrize("beams", [1, 4])
def test_running_out_of_memory_leaves_the_model_usable(beams: int) -> None:
    pair = cuda_copies()
    pair.fast.engine_options = {"min_bucket": 8}
    small = {"num_beams": beams, "max_new_tokens": 6}
    expected = generate(pair.stock, 2, **small).tolist()
    assert generate(pair.fast, 2, **small).tolist() == expected
    with at_most(400 * MIB):
        for rows, length in ((4096, 512), (8192, 256)):
            with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate .*[KMG]iB"):
                generate(pair.fast, rows, length, num_beams=beams)
            assert generate(pair.fast, 2, **small).tolist() == expected
    assert generate(pair.fast, 2, **small).tolist() == expected
    assert generate(pair.fast, 600, 64, num_beams=beams).shape == (600, 5)


@torch.no_grad()
def test_a_session_that_runs_out_of_memory_can_go_on() -> None:
    """More than any GPU has, for a tensor that ONNX Runtime allocates."""
    stock = medium_stock(d_model=64, d_ff=2**16, num_heads=1, num_layers=1).to(DEVICE)
    model = fast_of(stock, torch.float32)
    expected = stock.encoder(input_ids=ids(2, 12)).last_hidden_state
    rows = torch.cuda.get_device_properties(DEVICE).total_memory // (512 * 4 * 2**16) + 64
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate .*[KMG]iB"):
            model.encoder(input_ids=ids(rows, 512))
        found = model.encoder(input_ids=ids(2, 12)).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_running_out_of_memory_in_a_step_keeps_the_kv_cache_usable() -> None:
    """The next bucket does not fit; the sequence goes on once there is room."""
    pair = cuda_copies()
    pair.fast.engine_options = {"min_bucket": 1024}
    rows = 128
    source, prompt = ids(rows, 4), ids(rows, 1030, seed=2)
    with torch.no_grad():
        first = pair.fast(input_ids=source, decoder_input_ids=prompt[:, :1020], use_cache=True)
        step = {
            "encoder_outputs": (first.encoder_last_hidden_state,),
            "decoder_input_ids": prompt[:, 1020:1030],
            CACHE: first[CACHE],
        }
        # the bucket of 2,048 slots takes 64 MiB and more
        with at_most(24 * MIB), pytest.raises(torch.OutOfMemoryError):
            pair.fast(**step)
        assert first[CACHE].get_seq_length() == 1020
        found = pair.fast(**step).logits
        expected = pair.stock(input_ids=source, decoder_input_ids=prompt).logits[:, 1020:]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-3)


def test_memory_is_given_back() -> None:
    model = fast_of(medium_stock(), torch.bfloat16, {"min_bucket": 1024})
    generate(model, 64)
    model.invalidate_engine()
    before = used()
    generate(model, 64)
    generate(model, 96, num_beams=2)
    assert used() > before + 300 * MIB, "the buckets of this test are large"
    model.invalidate_engine()
    assert used() < before + SLACK
    generate(model, 64)
    del model
    assert used() < before + SLACK


def test_a_copy_or_a_cast_gives_the_old_engines_back() -> None:
    model = fast_of(medium_stock(), torch.float32, {"min_bucket": 1024})
    generate(model, 64)
    model.invalidate_engine()
    before = used()
    for change in (lambda m: m.half(), lambda m: m.float(), copy.deepcopy):
        generate(model, 64)
        model = change(model)
    model.invalidate_engine()
    assert used() < before + SLACK


def captured() -> int:
    """How many captured CUDA graphs are alive."""
    gc.collect()
    return sum(type(item) is CapturedGraph for item in gc.get_objects())


def test_idle_buckets_are_bounded_and_their_graphs_freed() -> None:
    others = captured()
    model = fast_of(medium_stock(), torch.bfloat16, {"min_bucket": 1024, "max_cached_graphs": 1})
    generate(model, 64)
    after_one, graphs = used(), captured() - others
    assert graphs
    for rows in (16, 24, 32, 40, 48, 56):
        generate(model, rows)
        assert captured() - others <= graphs
    assert used() < after_one + SLACK
    model.invalidate_engine()
    assert captured() == others


def test_weights_are_held_once() -> None:
    """Weights, KV buffers and 15 %, and what each session's cuBLAS and cuDNN handles take."""
    stock = medium_stock(d_model=1024, d_ff=4096, num_heads=16, num_layers=8)
    weights = sum(p.numel() for p in stock.parameters()) * 2
    generate(fast_of(medium_stock(), torch.bfloat16), 1)  # loads the libraries
    before = used()
    model = fast_of(stock, torch.bfloat16)
    generate(model, 1)
    assert used() - before < 1.15 * weights + 3 * SLACK
    assert decoded(model, {"input_ids": ids(1, 8), "decoder_input_ids": ids(1, 8)}).isfinite().all()
