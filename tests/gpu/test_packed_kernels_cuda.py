"""Kernels of an encoder over packed tokens against torch, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastgen.engines.fused import packed_kernels as kernels
from fastgen.engines.fused.encoder import compile_kernels, side_streams
from fastgen.engines.fused.packed_attention import Attention, BiasedAttention, Table
from fastgen.engines.fused.packed_places import Count, Place, Spread
from fastgen.engines.fused.packed_products import Product, Products
from fastgen.engines.fused.packed_values import Buffer, Call, Norm, Size, Term
from tests.gpu.models import DEVICE, DTYPES, ids, ragged

pytestmark = pytest.mark.cuda

WIDTHS = [8, 24, 384, 1024, 8192, 33, 770]  # the last two are loaded one by one


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to one rounding to the dtype, and to float32's order of sums."""
    eps = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps)


def random(*axes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(axes, generator=generator).to(DEVICE, dtype)


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
    Count.reference(call)
    Place.reference(call, size)
    return size


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (64, 128), (5, 1000), (700, 3)])
def test_places(shape: tuple[int, int], masked: bool, padding: bool) -> None:
    mask = ragged(*shape) if masked else None
    found, expected = (call_of(mask, shape, 8, padding) for _ in range(2))
    count, place, size = Count(), Place(), size_of(*shape)
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
    embed, spread = kernels.Embed(terms, norm, y), Spread(y)
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


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["RELU", "GELU_TANH", "GELU_ERF", "SILU"])
@pytest.mark.parametrize("width", [8, 3072, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype, width: int, kind: str, gated: bool) -> None:
    x = Buffer(width, 3 * random(70, width, dtype=dtype))
    gate = Buffer(width, random(70, width, dtype=dtype, seed=1)) if gated else None
    kernel, before, size = kernels.Activate(x, kind, gate), x.tensor.clone(), size_of(1, 70, 69)
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


@pytest.mark.parametrize("lengths", [(1, 39, 1, 199), (512,), (64, 65, 63, 128)])
@pytest.mark.parametrize("head_size", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_with_a_position_table(
    dtype: torch.dtype, head_size: int, lengths: tuple[int, ...]
) -> None:
    """Rows of all lengths, some of whose tokens are seen by nobody, and columns in any order."""
    total, longest = sum(lengths), max(lengths)
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0).int()
    seen = [length - length // 3 for length in lengths]
    keys = torch.tensor(seen, dtype=torch.int32, device=DEVICE)
    columns = ids(1, total, 400).flatten().int()
    size = Size(total + 5, longest, starts, keys, columns=columns)
    width = 3 * head_size
    buffers = [Buffer(width, random(total + 5, width, dtype=dtype, seed=n)) for n in range(3)]
    buckets = ids(1, 257, 32).flatten().int() % 32
    table = Table(random(32, 3, dtype=dtype, seed=9), buckets)
    attention = BiasedAttention(*buffers, heads=3, scale=0.3, table=table)
    attention.y.tensor = torch.zeros(total + 5, width, dtype=dtype, device=DEVICE)
    compile_kernels((attention,), dtype, DEVICE)
    attention(size)
    found = attention.y.tensor.clone()
    attention.reference(size)
    rough = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(found, attention.y.tensor, rtol=rough, atol=rough)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_a_residual_stream(dtype: torch.dtype, width: int) -> None:
    stream = Buffer(width, 3e4 * random(9, width), dtype=torch.float32)
    y, norm = (
        Buffer(width, random(9, width, dtype=dtype)),
        Norm(random(width).to(dtype), None, 1e-6),
    )
    kernel = kernels.NormStream(stream, norm, y)
    compile_kernels((kernel,), dtype, DEVICE)
    kernel(size_of(1, 9, 9))
    found = y.tensor.clone()
    kernel.reference(size_of(1, 9, 9))
    close(found, y.tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_begin_a_residual_stream(dtype: torch.dtype) -> None:
    call = call_of(ragged(4, 19), (4, 19), 264, padding=False)
    size = placed(call)
    y = Buffer(264, torch.zeros(76, 264, dtype=dtype, device=DEVICE))
    stream = Buffer(264, torch.zeros(76, 264, device=DEVICE), dtype=torch.float32)
    norm = Norm(random(264, dtype=dtype, seed=7), None, 1e-6)
    embed = kernels.Embed([Term("input_ids", random(96, 264, dtype=dtype))], norm, y, stream)
    compile_kernels((embed,), dtype, DEVICE)
    embed(call, size)
    found, sums = y.tensor.clone(), stream.tensor.clone()
    embed.reference(call, size)
    close(found, y.tensor)
    assert torch.equal(sums, stream.tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_added_to_a_residual_stream_in_float32(dtype: torch.dtype) -> None:
    x, weight = random(50, 64, dtype=dtype), random(96, 64, dtype=dtype, seed=1)
    before = 1e5 * random(50, 96, seed=2)  # beyond float16
    stream = Buffer(96, before.clone(), dtype=torch.float32)
    products = Products([Product(Buffer(64, x), weight.T, None, onto=stream)])
    assert [*products.writes] == [stream]
    products(size_of(1, 50, 50))
    expected = before.double() + x.double() @ weight.T.double()
    torch.testing.assert_close(stream.tensor.double(), expected, rtol=1e-5, atol=1e-2)


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
    side = side_streams(DEVICE, 50)
    products.ahead = kernels.Prefetch(weights)
    compile_kernels((products.ahead,), dtype, DEVICE)
    products(replace(size_of(1, 50, 50), side=side[:2], fetching=side[2]))
    torch.cuda.synchronize()
    for y, weight in zip(products.writes, weights, strict=True):
        expected = 0.5 * x.tensor.double() @ weight.T.double() + bias.double()
        rough = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(y.tensor.double(), expected, rtol=rough, atol=rough)
