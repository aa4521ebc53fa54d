"""The engine among other GPU work: CUDA graphs, the caller's stream, DLPack edges, threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.gpu.models import (
    DEVICE,
    DTYPES,
    cuda_copies,
    cuda_pair,
    decoded,
    fast_of,
    ids,
    mask,
    medium_stock,
)

pytestmark = pytest.mark.cuda

SLEEP_CYCLES = 400_000_000  # some tenths of a second


def prompt(seed: int = 1) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(3, 12, seed=seed), "decoder_input_ids": ids(3, 9, seed=seed + 100)}


# CUDA graphs


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_change_no_result(dtype: torch.dtype) -> None:
    stock = medium_stock()
    found = []
    for graphs in (True, False):
        model = fast_of(stock, dtype, {"cuda_graphs": graphs, "min_bucket": 8})
        logits = decoded(model, prompt(), prefill=3)
        tokens = model.generate(ids(2, 12), max_new_tokens=30, min_new_tokens=30)
        beams = model.generate(ids(2, 12), max_new_tokens=30, num_beams=3)
        found.append((logits, tokens.tolist(), beams.tolist()))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_a_graph_serves_other_prompts_and_lengths() -> None:
    pair = cuda_copies()
    for seed, length in ((1, 12), (2, 12), (3, 5), (4, 30), (1, 12)):
        call = {"input_ids": ids(2, length, seed=seed), "max_new_tokens": 10}
        assert pair.fast.generate(**call).tolist() == pair.stock.generate(**call).tolist()


def test_weights_edited_in_place_reach_captured_graphs() -> None:
    pair = cuda_copies()
    pair.fast.generate(ids(2, 12), max_new_tokens=6)
    for model in (pair.stock, pair.fast):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
    expected = pair.stock.generate(ids(2, 12), max_new_tokens=12)
    assert pair.fast.generate(ids(2, 12), max_new_tokens=12).tolist() == expected.tolist()


# Streams


def test_the_callers_stream_is_respected() -> None:
    """Inputs that a slow kernel of the caller's stream has yet to write, outputs read on it, and
    inputs overwritten right behind the call."""
    model = cuda_copies().fast
    expected, unwritten = decoded(model, prompt()), decoded(model, prompt(seed=5))
    assert not torch.equal(expected, unwritten)
    given, source = prompt(seed=5), prompt()
    result = torch.zeros_like(expected)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for name, tensor in given.items():
            tensor.copy_(source[name])
        found = decoded(model, given)
        for tensor in given.values():
            tensor.zero_()
        result.copy_(found)
    stream.synchronize()
    torch.testing.assert_close(result, expected)


def test_generate_in_a_side_stream() -> None:
    pair = cuda_copies()
    source, stream = ids(3, 12), torch.cuda.Stream(DEVICE)
    call = {"attention_mask": mask(3, 12), "max_new_tokens": 14}
    expected = pair.stock.generate(source, **call).tolist()
    given = torch.full_like(source, 7)
    pair.fast.generate(given, **call)
    torch.cuda.synchronize()
    for _ in range(2):
        given.fill_(7)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)
            given.copy_(source)
            found = pair.fast.generate(given, **call)
            assert torch.cuda.current_stream() == stream
            assert found.tolist() == expected


def test_the_first_call_may_be_in_a_side_stream() -> None:
    """Weights that a slow kernel has yet to write, when engines are built and graphs captured."""
    pair = cuda_copies()
    expected = decoded(pair.stock, prompt())
    states = {name: value.clone() for name, value in pair.fast.state_dict().items()}
    with torch.no_grad():
        for parameter in pair.fast.parameters():
            parameter.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        pair.fast.load_state_dict(states)
        found = decoded(pair.fast, prompt())
    stream.synchronize()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-3)


# DLPack edges


def test_cupy_arrays_go_in_and_come_out_without_a_copy() -> None:
    cupy = pytest.importorskip("cupy")
    from fastgen.hf.forward import as_torch

    pair = cuda_pair("t5-1.1")
    source, prefix = ids(3, 12), ids(3, 5, seed=2)
    given, decoder = cupy.from_dlpack(source), cupy.from_dlpack(prefix)
    assert as_torch(given).data_ptr() == given.data.ptr == source.data_ptr()
    tokens = pair.fast.generate(given, max_new_tokens=8)
    assert isinstance(tokens, torch.Tensor)
    assert tokens.tolist() == pair.stock.generate(source, max_new_tokens=8).tolist()
    assert cupy.from_dlpack(tokens).data.ptr == tokens.data_ptr()
    with torch.no_grad():
        output = pair.fast(input_ids=given, decoder_input_ids=decoder)
        expected = pair.stock(input_ids=source, decoder_input_ids=prefix)
    for name in ("logits", "encoder_last_hidden_state"):
        found = cupy.from_dlpack(output[name])
        assert found.data.ptr == output[name].data_ptr()
        host = torch.from_numpy(cupy.asnumpy(found))
        torch.testing.assert_close(host, expected[name].cpu(), rtol=1e-4, atol=2e-3)


# Threads


def in_threads(jobs: list[Any]) -> list[Any]:
    """The jobs' results; all begin together, each in a thread of its own."""
    barrier = threading.Barrier(len(jobs))

    def start(job: Any) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(start, job) for job in jobs]]


@pytest.mark.parametrize("beams", [1, 3])
def test_four_threads_call_one_model(beams: int) -> None:
    """Engines are built and graphs captured while the other threads run."""
    pair = cuda_copies()
    pair.fast.engine_options = {"min_bucket": 8}
    calls = [
        {"input_ids": ids(1 + i, 6 + 5 * i, seed=i), "max_new_tokens": 12 + i, "num_beams": beams}
        for i in range(4)
    ]
    expected = [pair.stock.generate(**call).tolist() for call in calls]

    def job(call: dict[str, Any]) -> list[Any]:
        return [pair.fast.generate(**call).tolist() for _ in range(4)]

    found = in_threads([lambda call=call: job(call) for call in calls])
    assert found == [[tokens] * 4 for tokens in expected]


def test_threads_with_streams_and_models_of_their_own() -> None:
    pairs = [cuda_copies(name) for name in ("t5-1.0", "t5-1.1", "umt5", "t5-1.1")]
    expected = [pair.stock.generate(ids(2, 12), max_new_tokens=12).tolist() for pair in pairs]

    def job(model: Any) -> list[Any]:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            source = ids(2, 12)
            return [model.generate(source, max_new_tokens=12).tolist() for _ in range(4)]

    found = in_threads([lambda model=pair.fast: job(model) for pair in pairs])
    assert found == [[tokens] * 4 for tokens in expected]


def test_torch_allocates_in_another_thread_while_graphs_are_captured() -> None:
    pair = cuda_copies()
    expected = pair.stock.generate(ids(2, 12), max_new_tokens=8).tolist()
    done = threading.Event()

    def allocate() -> None:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            while not done.is_set():
                torch.rand(1 << 18, device=DEVICE).sum()
                torch.cuda.empty_cache()

    def generate() -> list[Any]:
        try:
            found = []
            for _ in range(5):
                pair.fast.invalidate_engine()  # the next call builds and captures anew
                found.append(pair.fast.generate(ids(2, 12), max_new_tokens=8).tolist())
            return found
        finally:
            done.set()

    assert in_threads([allocate, generate])[1] == [expected] * 5
