"""What goes wrong in the middle of a call on a GPU leaves a model that is usable and right."""

from __future__ import annotations

import _thread
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.gpu.memory import MIB, at_most
from tests.gpu.models import DEVICE, cuda_copies, ids

pytestmark = pytest.mark.cuda

CALLS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"do_sample": True, "top_k": 1},
    {"repetition_penalty": 1.4},
]


class Then(LogitsProcessor):
    """Does something when the third token is chosen."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == 3:
            self._action()
        return scores


class OwnError(Exception):
    pass


def generate(model: Any, number: int, then: Callable[[], None] | None = None) -> Any:
    """A call of a size and a kind by number; ``then`` in the middle of it."""
    call = {"max_new_tokens": 8, "min_new_tokens": 5, **CALLS[number % len(CALLS)]}
    if then is not None:
        call["logits_processor"] = LogitsProcessorList([Then(then)])
    return model.generate(ids(1 + number % 3, 5 + number * 5 % 40, seed=number), **call).tolist()


@pytest.fixture
def pair() -> Any:
    """Few sizes are kept, so that most faults meet a capture."""
    made = cuda_copies()
    made.fast.engine_options = {"min_bucket": 4, "max_cached_graphs": 1}
    return made


def assert_right(pair: Any, numbers: range = range(4)) -> None:
    for number in numbers:
        assert generate(pair.fast, number) == generate(pair.stock, number)
    torch.rand(3, device=DEVICE)
    torch.cuda.empty_cache()


def test_interrupts(pair: Any) -> None:
    moments, interrupted = random.Random(1), 0
    for trial in range(40):
        done = threading.Event()
        wait = moments.uniform(0, 0.06)

        def interrupt(wait: float = wait, done: threading.Event = done) -> None:
            time.sleep(wait)
            if not done.is_set():
                _thread.interrupt_main()

        timer = threading.Thread(target=interrupt)
        try:
            timer.start()
            for number in range(trial, trial + 3):
                generate(pair.fast, number)
            done.set()
            timer.join()
            time.sleep(0.001)  # one that is on its way arrives here
        except KeyboardInterrupt:
            interrupted += 1
            timer.join()
        if trial % 8 == 7:
            assert_right(pair)
    assert interrupted > 5
    assert_right(pair)


def test_errors_of_the_program(pair: Any) -> None:
    def fail() -> None:
        raise OwnError

    for number in range(12):
        with pytest.raises(OwnError):
            generate(pair.fast, number, fail)
        assert_right(pair, range(number, number + 1))


def test_out_of_memory(pair: Any) -> None:
    for number in range(3):
        with at_most(64 * MIB), pytest.raises(torch.OutOfMemoryError):
            pair.fast.generate(ids(2048, 256), max_new_tokens=4, num_beams=1 + number)
        assert_right(pair)


def test_side_streams(pair: Any) -> None:
    streams = [torch.cuda.Stream(DEVICE) for _ in range(40)]  # torch has 32: some are the same
    expected = [generate(pair.stock, number) for number in range(8)]
    for number, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            assert generate(pair.fast, number % 8) == expected[number % 8]


def test_moves_between_devices_and_dtypes(pair: Any) -> None:
    def leave() -> None:
        pair.fast.to("cpu")
        raise OwnError

    for number in range(6):
        with pytest.raises(OwnError):
            generate(pair.fast, number, leave)
        source = ids(2, 9).cpu()
        expected = pair.stock.to("cpu").generate(source, max_new_tokens=6).tolist()
        assert pair.fast.generate(source, max_new_tokens=6).tolist() == expected
        for model in (pair.stock, pair.fast):
            model.to(DEVICE)
        assert_right(pair, range(number, number + 2))
    pair.fast.half()
    generate(pair.fast, 0)
    pair.stock.half().float()  # the same rounding
    pair.fast.float()
    assert_right(pair)


def test_a_model_that_is_used_in_the_middle_of_a_call(pair: Any) -> None:
    """By the program's own code, on another stream."""
    stream, inner = torch.cuda.Stream(DEVICE), []
    expected = generate(pair.stock, 5)

    def nested() -> None:
        with torch.cuda.stream(stream):
            inner.append(generate(pair.fast, 5))

    for number in (0, 1):
        found = generate(pair.fast, number, nested)
        assert found == generate(pair.stock, number)
    assert inner
    assert all(tokens == expected for tokens in inner)
