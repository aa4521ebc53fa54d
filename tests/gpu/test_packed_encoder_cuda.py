"""Encoders over packed tokens on a GPU: whole models against stock."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertModel

import fastgen
from fastgen.execution.capturing import CAPTURED_TOKENS
from fastgen.execution.encoder import Encoder
from tests.gpu.models import DEVICE, DTYPES, distance, ids, masked

pytestmark = pytest.mark.cuda


@functools.cache
def stock(head: type = BertModel) -> Any:
    """A model of real head size with random weights, fp32 on the CPU; not to be changed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 4}
    config = BertConfig(**sizes, num_attention_heads=4, intermediate_size=512)
    model = head(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.normal_(std=scale).add_(float("LayerNorm.weight" in name))
    return model


def fast_of(dtype: torch.dtype, head: type = BertModel, **options: Any) -> Any:
    model = getattr(fastgen, f"Fast{head.__name__}")(copy.deepcopy(stock(head).config)).eval()
    model.load_state_dict(stock(head).state_dict())
    model.engine_options = options
    return model.to(DEVICE, dtype)


def engine_of(model: Any) -> Encoder:
    stack = model if isinstance(model, BertModel) else model.bert
    engine: Encoder = stack._current_engine()
    assert engine.fused is not None, "another engine runs it"
    return engine


def arguments(rows: int, length: int, mask: str | None) -> dict[str, torch.Tensor]:
    """Token ids and types with a mask by its kind; CAPTURED_TOKENS decides what serves them."""
    given = {"input_ids": ids(rows, length, 512), "token_type_ids": ids(rows, length) % 2}
    return given | masked(mask, rows, length)


@pytest.mark.parametrize("mask", [None, "right", "holes"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_errors_are_no_larger_than_stocks(dtype: torch.dtype, mask: str | None) -> None:
    fast, same = fast_of(dtype), copy.deepcopy(stock()).to(DEVICE, dtype)
    exact = copy.deepcopy(same).double().cpu()
    for shape in ((1, 7), (3, 65), (40, 60)):
        call = arguments(*shape, mask)
        assert fast.refusal(**call) is None
        expected = exact(**{name: value.cpu() for name, value in call.items()})[0]
        own, stocks = (distance(model, call, expected) for model in (fast, same))
        assert own <= 1.1 * stocks + 1e-6, (shape, own, stocks)
    engine = engine_of(fast)
    assert [size[:3] for size in engine._replays] == [(32, 1, 32), (288, 3, 96)]
    assert engine._counted is not None  # for the last, the next power of two
    assert engine._counted.tokens == (4096 if mask is None else 2048)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_padding_that_a_head_reads_is_computed(dtype: torch.dtype) -> None:
    fast = fast_of(dtype, BertForQuestionAnswering)
    same = copy.deepcopy(stock(BertForQuestionAnswering)).to(DEVICE, dtype)
    exact = copy.deepcopy(same).double().cpu()
    for shape in ((3, 65), (40, 100)):
        call = arguments(*shape, "holes")
        expected = exact(**{name: value.cpu() for name, value in call.items()})
        for field in ("start_logits", "end_logits"):
            own, stocks = (
                float((model(**call)[field].double().cpu() - expected[field]).norm())
                for model in (fast, same)
            )
            assert own <= 1.2 * stocks + 1e-4
    engine_of(fast)


@pytest.mark.parametrize("shape", [(3, 65), (40, 100)])
@torch.no_grad()
def test_what_is_hidden_is_zeros_but_where_rows_begin(shape: tuple[int, int]) -> None:
    call = arguments(*shape, "holes")
    hidden = fast_of(torch.bfloat16)(**call).last_hidden_state
    computed = call["attention_mask"].bool()
    computed[:, 0] = True
    assert torch.equal(hidden.any(-1), computed)


@torch.no_grad()
def test_one_graph_serves_a_padded_size() -> None:
    fast, launched = fast_of(torch.bfloat16), fast_of(torch.bfloat16, cuda_graphs=False)
    for shape in ((3, 40), (1, 7), (3, 33), (2, 64), (1, 1), (3, 40)):
        for mask in (None, "right", "holes"):
            call = arguments(*shape, mask)
            found, expected = (model(**call)[0] for model in (fast, launched))
            torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    assert [size[:3] for size in engine_of(fast)._replays] == [
        (128, 2, 64),
        (32, 1, 32),
        (192, 3, 64),
    ]
    assert not engine_of(launched)._replays
    fast(**arguments(CAPTURED_TOKENS // 32 + 1, 32, "right"))
    assert len(engine_of(fast)._replays) == 3


@pytest.mark.parametrize("mask", [None, "full"])
@torch.no_grad()
def test_large_calls_of_even_rows(mask: str | None) -> None:
    """Which a mask of ones alone has, too: by another kernel of torch's, launched and captured."""
    fast, padded = fast_of(torch.bfloat16), fast_of(torch.bfloat16, skip_padding=False)
    call = arguments(30, 100, None)
    if mask == "full":
        call["attention_mask"] = torch.ones_like(call["input_ids"])
    expected = padded(**arguments(30, 100, "right") | {"input_ids": call["input_ids"]})[0]
    found = [fast(**call)[0] for _ in range(5)]
    assert [*engine_of(fast)._replays] == [(3000, 30, 100, True)]
    torch.testing.assert_close(found[0], found[-1], rtol=3e-2, atol=3e-2)
    whole = (arguments(30, 100, "right")["attention_mask"] != 0).all(dim=1)
    torch.testing.assert_close(found[0][whole], expected[whole], rtol=3e-2, atol=3e-2)


@torch.no_grad()
def test_large_calls_are_captured_once_their_size_comes_back() -> None:
    fast = fast_of(torch.bfloat16)
    call = arguments(30, 100, "right")
    expected = fast(**call)[0]
    call["attention_mask"][0, -1] = 0  # another number of tokens, of the same padded size
    for count in range(4):
        assert len(engine_of(fast)._replays) == (count > 2)
        found = fast(**call)[0]
    assert [size[:3] for size in engine_of(fast)._replays] == [(1536, 30, 128)]
    torch.testing.assert_close(found[1:], expected[1:], rtol=3e-2, atol=3e-2)


@torch.no_grad()
def test_small_calls_do_not_wait_for_the_gpu() -> None:
    fast, call = fast_of(torch.bfloat16), arguments(3, 40, "holes")
    fast(**call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_weights_that_are_edited_or_moved() -> None:
    fast, same = fast_of(torch.float32), copy.deepcopy(stock()).to(DEVICE)
    small, large = arguments(2, 9, "right"), arguments(30, 100, "right")

    def check(rough: float) -> None:
        for call in (small, large):
            seen = call["attention_mask"].bool()
            found, expected = (model(**call)[0][seen] for model in (fast, same))
            torch.testing.assert_close(found, expected, rtol=rough, atol=rough)

    check(5e-3)
    for model in (fast, same):
        model.encoder.layer[1].attention.self.value.weight.mul_(2)
        model.encoder.layer[2].output.dense.weight.data.mul_(3)
        model.embeddings.word_embeddings.weight.add_(0.1)
    check(5e-3)
    for model in (fast, same):
        model.to("cpu").to(DEVICE, torch.bfloat16)
    check(1e-1)
    assert engine_of(fast).target.dtype == "bfloat16"


@torch.no_grad()
def test_threads_and_streams() -> None:
    fast = fast_of(torch.bfloat16)
    calls = [arguments(2 + n % 3, 20 + 7 * n, "holes") for n in range(6)]
    calls += [arguments(30 + n, 100, "right") for n in range(2)]
    expected = [fast(**call)[0] for call in calls]
    found: list[Any] = [None] * len(calls)

    def work(n: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                found[n] = fast(**calls[n])[0]
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_hidden_states_of_all_layers_are_served_by_the_other_engine() -> None:
    fast, call = fast_of(torch.float32), arguments(2, 9, "right")
    states = fast(**call, output_hidden_states=True).hidden_states
    expected = copy.deepcopy(stock()).to(DEVICE)(**call, output_hidden_states=True).hidden_states
    seen = call["attention_mask"].bool()
    for one, other in zip(states, expected, strict=True):
        torch.testing.assert_close(one[seen], other[seen], rtol=5e-3, atol=5e-3)


def test_in_inference_mode_and_without_the_kernels() -> None:
    fast, plain = fast_of(torch.float32), fast_of(torch.float32, fused_kernels=False)
    call = arguments(2, 9, "right")
    seen = call["attention_mask"].bool()
    with torch.inference_mode():
        first = fast(**call)[0][seen]
    with torch.no_grad():
        torch.testing.assert_close(fast(**call)[0][seen], first)
        torch.testing.assert_close(plain(**call)[0][seen], first, rtol=5e-3, atol=5e-3)
        assert plain._current_engine().fused is None
        assert "faster on a GPU" in plain.explain(**arguments(64, 128, None)).reasons[0]
