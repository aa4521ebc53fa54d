"""Many threads on one GPU: fresh sizes all the time, two models, and a stock model beside them.

Sizes are captured anew nearly every call, since few are kept; what the other threads do meanwhile
must neither break that nor be broken by it, and no token may change.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch

from fastgen import EngineOptions, cuda_graph
from fastgen.generation import draws
from tests.configs import build_pair
from tests.gpu.models import DEVICE, cuda_pair, ids

pytestmark = pytest.mark.cuda

THREADS, CALLS, KINDS = 8, 200, 60
MODELS = ("t5-1.1", "umt5")


def fast(name: str, **options: Any) -> Any:
    model = copy.deepcopy(build_pair(name).fast).to(DEVICE)
    model.engine_options = EngineOptions(**{"min_bucket": 4, "max_cached_graphs": 2} | options)
    return model


@torch.no_grad()
def answer(models: list[Any], number: int) -> Any:
    """What one of the kinds of calls returns, which is the same every time; a call that samples
    freely gives how many of its tokens are no tokens."""
    model = models[number % len(models)]
    source = ids(1 + number % 3, 3 + number * 7 % 61, seed=number)
    new = {"max_new_tokens": 2 + number % 4}
    match number // len(models) % 6:
        case 0:
            return model.generate(source, **new).tolist()
        case 1:
            return model.generate(source, num_beams=2 + number % 2, **new).tolist()
        case 2:  # the draws of other threads do not matter: one token is left to choose
            return model.generate(source, do_sample=True, top_k=1, **new).tolist()
        case 3:
            return model.encoder(input_ids=source).last_hidden_state
        case 4:
            return model.generate(source, repetition_penalty=1.5, no_repeat_ngram_size=2).tolist()
        case _:
            beams = 1 + number % 2
            tokens = model.generate(source, do_sample=True, top_k=0, num_beams=beams, **new)
            return int(((tokens < 0) | (tokens >= model.config.vocab_size)).sum())


def same(found: Any, expected: Any) -> bool:
    return torch.equal(found, expected) if torch.is_tensor(found) else bool(found == expected)


class Beside:
    """A program that knows nothing of fastgen, in a thread of its own until the body ends."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self._work, self._done, self.turns = work, threading.Event(), 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._done.is_set():
                self._work(self.turns)
                self.turns += 1
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.turns


def in_a_new_thread(action: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(action).result()


def stock_work() -> Callable[[int], None]:
    """Stock torch at its daily work: a model, memory, streams, events, draws, and waits."""
    stock, source = cuda_pair(MODELS[0]).stock, ids(2, 9)
    expected = stock.generate(source, max_new_tokens=3).tolist()

    def matrix() -> torch.Tensor:
        return torch.ones(64, 64, device=DEVICE) @ torch.ones(64, 64, device=DEVICE)

    def work(turn: int) -> None:
        assert stock.generate(source, max_new_tokens=3).tolist() == expected
        stock.generate(source, max_new_tokens=2, do_sample=True)
        torch.rand(turn % 5000 + 1, device=DEVICE)
        torch.rand(7, device=DEVICE, generator=torch.Generator(DEVICE))
        torch.empty((turn % 40 + 1) << 20, dtype=torch.uint8, device=DEVICE).zero_()
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):  # torch's 32 streams, all in turn
            event = torch.cuda.Event()
            total = torch.ones(1000, device=DEVICE).sum()
            event.record()
            event.query()
            assert total.item() == 1000
        in_a_new_thread(matrix)  # with a cuBLAS handle of its own
        torch.ones(1 << 16).pin_memory().to(DEVICE, non_blocking=True)
        if turn % 7 == 0:
            torch.cuda.empty_cache()
        if turn % 11 == 0:
            torch.cuda.synchronize()

    return work


def test_many_threads_two_models_and_stock_beside_them() -> None:
    models = [fast(name) for name in MODELS]
    expected = [answer(models, number) for number in range(KINDS)]
    wrong: list[int] = []

    def thread(index: int) -> None:
        for call in range(CALLS):
            number = (index * 23 + call * 7) % KINDS
            if not same(answer(models, number), expected[number]):
                wrong.append(number)

    with Beside(stock_work()), ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(thread, index) for index in range(THREADS)]:
            future.result()
    assert not wrong


def test_models_come_and_go_while_others_capture() -> None:
    """What an engine leaves is freed in whichever thread, with all its graphs."""
    models = [fast(MODELS[0])]
    expected = [answer(models, number) for number in range(0, KINDS, 5)]

    def come_and_go(turn: int) -> None:
        model = fast(MODELS[1])
        model.generate(ids(1, 5 + turn % 20, seed=turn), max_new_tokens=3)
        if turn % 2:
            model.invalidate_engine()
        del model
        gc.collect()

    with Beside(come_and_go):
        for _ in range(3):
            models[0].invalidate_engine()
            found = [answer(models, number) for number in range(0, KINDS, 5)]
            assert all(map(same, found, expected))


def test_broken_captures_are_mended() -> None:
    """The stream is waited for in the middle of a capture, as no mode allows."""
    capture, broken = cuda_graph._capture, []

    def breaking(gpu: Any, function: Callable[[], None]) -> Any:
        def middle() -> None:
            function()
            broken.append(1)
            if len(broken) % 4:  # three times in a row: then kernel by kernel
                gpu.stream.query()

        return capture(gpu, middle)

    model = fast(MODELS[0])
    expected = [answer([model], number) for number in range(20)]
    model.invalidate_engine()
    with mock.patch.object(cuda_graph, "_capture", breaking):
        found = [answer([model], number) for number in range(20)]
    assert len(broken) > 8
    assert all(map(same, found, expected))
    torch.rand(3, device=DEVICE)
    torch.cuda.empty_cache()
    model.invalidate_engine()
    assert all(same(answer([model], number), expected[number]) for number in range(20))


def test_captured_steps_draw_as_torch_does() -> None:
    """So the tokens are stock's for a seed, and so is what is drawn after them."""
    assert draws.are_torchs(DEVICE)
    pair, model = cuda_pair(MODELS[0]), fast(MODELS[0])
    for beams in (1, 3):
        call = {"do_sample": True, "top_k": 0, "num_beams": beams, "max_new_tokens": 12}
        found = []
        for one in (pair.stock, model, model):
            torch.manual_seed(beams)
            tokens = one.generate(ids(2, 9), **call).tolist()
            found.append((tokens, torch.rand(3, device=DEVICE).tolist()))
        assert found[0] == found[1] == found[2]


def test_outputs_outlive_the_calls_of_other_streams() -> None:
    """A slow stream has yet to read what its thread has dropped, when others generate."""
    model = fast(MODELS[0], min_bucket=8)
    sources = [ids(2, 9, seed=seed) for seed in range(8)]
    call = {"max_new_tokens": 6, "min_new_tokens": 6}
    expected = [model.generate(source, **call).tolist() for source in sources]
    results = [torch.zeros(2, 7, dtype=torch.int64, device=DEVICE) for _ in sources]
    torch.cuda.synchronize()
    slow, streams = torch.cuda.Stream(DEVICE), [torch.cuda.Stream(DEVICE) for _ in range(3)]
    for source, result in zip(sources, results, strict=True):
        with torch.cuda.stream(slow):
            tokens = model.generate(source, **call)
            torch.cuda._sleep(50_000_000)
            result.copy_(tokens)
            del tokens
        for stream in streams:
            with torch.cuda.stream(stream):
                model.generate(sources[0], **call)
    torch.cuda.synchronize()
    assert [result.tolist() for result in results] == expected
