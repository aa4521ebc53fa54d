"""Encoders over packed tokens on a GPU: kernels against torch, whole models against stock."""

from __future__ import annotations

import copy
import functools
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertModel

import fastgen
from fastgen.capturing import CAPTURED_TOKENS
from fastgen.encoder import Encoder
from fastgen.engines.fused import packed_kernels as kernels
from fastgen.engines.fused.encoder import compile_kernels, side_streams
from fastgen.engines.fused.packed_ops import Attention, Product, Products
from fastgen.engines.fused.packed_values import Buffer, Call, Norm, Size, Term
from tests.gpu.models import DEVICE, DTYPES, ids

pytestmark = pytest.mark.cuda

WIDTHS = [8, 24, 384, 1024, 8192, 33, 770]  # the last two are loaded one by one


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to one rounding to the dtype, and to float32's order of sums."""
    eps = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps)


def random(*axes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(axes, generator=generator).to(DEVICE, dtype)


def ragged(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """A mask with holes and padding on both sides; no row is empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < torch.rand(rows, 1, generator=generator)
    mask[:, length // 2] = True
    return mask.long().to(DEVICE)


def call_of(mask: torch.Tensor | None, shape: tuple[int, int], width: int, padding: bool) -> Call:
    def empty(*axes: int) -> torch.Tensor:
        return torch.full(axes, -7, dtype=torch.int32, device=DEVICE)

    return Call(
        ids={"input_ids": ids(*shape), "types": None},
        mask=mask,
        hidden=random(*shape, width),
        lengths=empty(shape[0]),
        visible=empty(shape[0]),
        tokens=empty(shape[0] * shape[1]),
        rows=empty(*shape),
        padding=padding,
    )


def size_of(rows: int, longest: int, tokens: int = 0) -> Size:
    starts, keys = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (rows + 1, rows))
    return Size(tokens, longest, starts, keys)


def placed(call: Call) -> Size:
    size = size_of(*call.rows.shape)
    kernels.Count.reference(call)
    kernels.Place.reference(call, size)
    return size


# Kernels


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (64, 128), (5, 1000), (700, 3)])
def test_places(shape: tuple[int, int], masked: bool, padding: bool) -> None:
    mask = ragged(*shape) if masked else None
    found, expected = (call_of(mask, shape, 8, padding) for _ in range(2))
    count, place, size = kernels.Count(), kernels.Place(), size_of(*shape)
    compile_kernels((count, place), torch.float32, DEVICE)
    count(found)
    place(found, size)
    wanted = placed(expected)
    for name in ("lengths", "visible", "tokens", "rows"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(size.starts, wanted.starts) and torch.equal(size.keys, wanted.keys)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_and_spread(dtype: torch.dtype, width: int) -> None:
    call = call_of(ragged(4, 19), (4, 19), width, padding=False)
    call = replace(call, hidden=call.hidden.to(dtype))
    size = placed(call)
    tables = [random(rows, width, dtype=dtype, seed=rows) for rows in (96, 2, 30)]
    terms = Term("input_ids", tables[0], 1.5), Term("types", tables[1]), Term(None, tables[2], 1, 2)
    norm = Norm(random(width, dtype=dtype, seed=7), random(width, dtype=dtype, seed=8), 1e-5)
    y = Buffer(width, torch.zeros(76, width, dtype=dtype, device=DEVICE))
    embed, spread = kernels.Embed(terms, norm, y), kernels.Spread(y)
    compile_kernels((embed, spread), dtype, DEVICE)
    embed(call, size)
    found = y.tensor.clone()
    embed.reference(call, size)
    close(found, y.tensor)
    spread(call)
    found = call.hidden.clone()
    spread.reference(call)
    assert torch.equal(found, call.hidden)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: torch.dtype, width: int, added: bool) -> None:
    x, residual, y = (
        Buffer(width, 3 * random(9, width, dtype=dtype, seed=seed) + 5) for seed in range(3)
    )
    norm = Norm(random(width, dtype=dtype, seed=7), random(width, dtype=dtype, seed=8), 1e-12)
    kernel = kernels.NormRows(x, residual if added else None, norm, y)
    compile_kernels((kernel,), dtype, DEVICE)
    kernel(size_of(1, 9, 9))
    found = y.tensor.clone()
    kernel.reference(size_of(1, 9, 9))
    close(found, y.tensor)


@pytest.mark.parametrize("kind", ["RELU", "GELU_TANH", "GELU_ERF", "SILU"])
@pytest.mark.parametrize("width", [8, 3072, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype, width: int, kind: str) -> None:
    x = Buffer(width, 3 * random(70, width, dtype=dtype))
    kernel, before, size = kernels.Activate(x, kind), x.tensor.clone(), size_of(1, 70, 69)
    compile_kernels((kernel,), dtype, DEVICE)
    kernel(size)
    found = x.tensor.clone()
    assert torch.equal(found[69], before[69])
    x.tensor.copy_(before)
    kernel.reference(size)
    close(found, x.tensor)


@pytest.mark.parametrize("head_size", [8, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: torch.dtype, head_size: int) -> None:
    """Rows of all lengths, some of whose tokens are seen by nobody."""
    starts = torch.tensor([0, 1, 40, 41, 240], dtype=torch.int32, device=DEVICE)
    keys = torch.tensor([1, 39, 1, 100], dtype=torch.int32, device=DEVICE)
    size = Size(250, 200, starts, keys)
    buffers = [Buffer(3 * head_size, random(250, 3 * head_size, dtype=dtype)) for _ in range(3)]
    attention = Attention(*buffers, heads=3, scale=0.3)
    attention(size)
    found = attention.writes[0].tensor[:240]
    qkv = (x.tensor.float().unflatten(1, (3, -1)) for x in buffers)
    expected = attention.reference(size, *qkv).flatten(1)[:240]
    rough = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=rough, atol=rough)


@pytest.mark.parametrize("activation", ["RELU", "GELU_TANH"])
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_are_activated(dtype: torch.dtype, rows: int, activation: str) -> None:
    x = Buffer(64, random(rows, 64, dtype=dtype))
    weight, bias = random(96, 64, dtype=dtype, seed=1) / 8, random(96, dtype=dtype, seed=9)
    products = Products([Product(x, weight.T, bias, activation=activation)])
    products.writes[0].tensor = torch.zeros(rows, 96, dtype=dtype, device=DEVICE)
    products(size_of(1, rows, rows))
    exact = x.tensor.double() @ weight.T.double() + bias.double()
    if activation == "RELU":
        expected = exact.relu()
    else:
        expected = torch.nn.functional.gelu(exact, approximate="tanh")
    rough = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    found = products.writes[0].tensor.double()
    torch.testing.assert_close(found, expected, rtol=rough, atol=rough)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_side_by_side(dtype: torch.dtype) -> None:
    x = Buffer(64, random(50, 64, dtype=dtype))
    weights = [random(96, 64, dtype=dtype, seed=seed) for seed in range(3)]
    bias = random(96, dtype=dtype, seed=9)
    products = Products([Product(x, weight.T, bias, 0.5) for weight in weights])
    for y in products.writes:
        y.tensor = torch.zeros(50, 96, dtype=dtype, device=DEVICE)
    size = replace(size_of(1, 50, 50), side=side_streams(DEVICE))
    products(size)
    torch.cuda.synchronize()
    for y, weight in zip(products.writes, weights, strict=True):
        expected = 0.5 * x.tensor.double() @ weight.T.double() + bias.double()
        rough = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(y.tensor.double(), expected, rtol=rough, atol=rough)


# Models


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
    if mask == "right":
        lengths = torch.linspace(length, 1, rows, device=DEVICE)
        given["attention_mask"] = (torch.arange(length, device=DEVICE) < lengths[:, None]).long()
    elif mask is not None:
        given["attention_mask"] = ragged(rows, length)
    return given


def distance(model: Any, call: dict[str, torch.Tensor], exact: torch.Tensor) -> float:
    found = model(**call)[0].double().cpu()
    seen = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool().cpu()
    return float((found - exact)[seen].norm() / exact[seen].norm())


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
    assert list(engine._replays) == [(32, 1, 32), (288, 3, 96)]
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
    assert list(engine_of(fast)._replays) == [(128, 2, 64), (32, 1, 32), (192, 3, 64)]
    assert not engine_of(launched)._replays
    fast(**arguments(CAPTURED_TOKENS // 32 + 1, 32, "right"))
    assert len(engine_of(fast)._replays) == 3


@torch.no_grad()
def test_large_calls_are_captured_once_their_size_comes_back() -> None:
    fast = fast_of(torch.bfloat16)
    call = arguments(30, 100, "right")
    expected = fast(**call)[0]
    call["attention_mask"][0, -1] = 0  # another number of tokens, of the same padded size
    for count in range(4):
        assert len(engine_of(fast)._replays) == (count > 2)
        found = fast(**call)[0]
    assert list(engine_of(fast)._replays) == [(1536, 30, 128)]
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
