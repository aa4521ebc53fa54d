"""Weights of fewer bits: layout, rounding, names."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen import blockwise
from fastgen.blockwise import GROUPS, KINDS, Format, blocks_of, dequantise, parse, quantise

DTYPES = torch.float32, torch.float16, torch.bfloat16
#: Largest error of a number, in parts of the largest number that shares its scale.
STEP = {"int8": 0.5 / 127, "int4": 1 / 8, "fp8": 1 / 16}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    group=st.sampled_from([16, 32, 128]),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 150)),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_a_weight_comes_back_but_for_a_step(
    kind: str, group: int, sizes: tuple[int, int], dtype: torch.dtype, magnitude: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(*sizes, generator=generator) * magnitude).to(dtype)
    blocks = quantise(weight, kind, group)  # type: ignore[arg-type]
    shapes = Format(kind, group).shapes(*sizes)  # type: ignore[arg-type]
    assert (blocks.values.shape, blocks.scales.shape) == shapes
    assert blocks.scales.dtype == (torch.float32 if kind == "fp8" else dtype)
    found = dequantise(blocks, sizes, torch.float32)
    across = sizes[1] if kind == "fp8" else group
    padded = torch.nn.functional.pad(weight.float(), (0, -sizes[1] % across))
    most = padded.unflatten(1, (-1, across)).abs().amax(2).repeat_interleave(across, 1)
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps / 2  # by which a small scale may be off, each step
    bound = most[:, : sizes[1]] * (STEP[kind] + info.eps) + 128 * subnormal
    assert ((found - weight.float()).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_steps_can_hold_is_held_exactly(kind: str) -> None:
    half = 128 if kind == "int8" else 8
    steps = torch.arange(-half + 1, half).repeat(3)[None].float()
    group = 512 if kind == "int8" else 16
    weight = steps * (1.0 if kind == "int8" else -0.5)
    if kind == "int4":  # a block holds one number that is farthest from zero
        weight = torch.tensor([[-8.0, *range(-7, 8)]]) * 0.5
    blocks = quantise(weight, kind, group)  # type: ignore[arg-type]
    assert torch.equal(dequantise(blocks, tuple(weight.shape), torch.float32), weight)  # type: ignore[arg-type]


def test_the_even_input_is_in_the_low_four_bits_and_padding_means_zero() -> None:
    weight = torch.tensor([[-8.0, 7.0, 1.0]])
    blocks = quantise(weight, "int4", 16)
    assert blocks.scales.tolist() == [[1.0]]
    assert blocks.values.tolist() == [[[0 | 15 << 4, 9 | 8 << 4, *[8 | 8 << 4] * 6]]]
    blocks = quantise(torch.tensor([[127.0, -127.0, 1.0]]), "int8", 16)
    assert blocks.values.tolist() == [[[255, 1, 129, *[128] * 13]]]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_numbers_below_the_dtype_are_zeros(kind: str) -> None:
    weight = torch.zeros(2, 40, dtype=torch.float16)
    weight[1] = 6e-8
    found = dequantise(quantise(weight, kind), (2, 40), torch.float32)
    assert torch.equal(found[0], torch.zeros(40))
    assert (found[1].abs() <= 6e-8).all()


def test_rows_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 50)
    whole = quantise(weight, "int8")
    monkeypatch.setitem(blockwise._FEW, "cpu", 100)
    parts = quantise(weight, "int8")
    assert torch.equal(whole.values, parts.values) and torch.equal(whole.scales, parts.scales)


def test_a_transposed_view_is_read_as_it_is() -> None:
    weight = torch.randn(20, 6)
    assert torch.equal(
        quantise(weight.T, "int4").values, quantise(weight.T.contiguous(), "int4").values
    )


def test_a_large_weight_is_shared_out_to_threads_in_any_mode() -> None:
    weight = torch.randn(300, 200)  # several parts
    expected = quantise(weight, "int4")
    with torch.inference_mode():
        found = quantise(torch.nn.Parameter(weight), "int4")
    assert torch.equal(found.values, expected.values) and not found.values.is_inference()
    weight[299, 199] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        quantise(weight, "fp8")


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinities_have_no_form(bad: float) -> None:
    with pytest.raises(ValueError, match="infinity or NaN"):
        quantise(torch.tensor([[1.0, bad]]), "int8")


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="kind='int5': allowed are 'int8', 'int4', 'fp8'"):
        quantise(torch.ones(1, 1), "int5")  # type: ignore[arg-type]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("kind", "inputs", "scales"), [("int8", 96, 3), ("int4", 96, 1)])
@pytest.mark.parametrize("odd", [0, 5])
def test_what_others_have_rounded_is_held_as_it_is(
    kind: str, inputs: int, scales: int, odd: int, zeros: bool
) -> None:
    """A scale of several blocks, of a row that ends in a block, zeros in the odd half of a byte."""
    inputs, scales = (inputs + odd, 1) if odd else (inputs, scales)
    levels, generator = {"int8": 256, "int4": 16}[kind], torch.Generator().manual_seed(1)
    steps = torch.randint(levels, (5, inputs), generator=generator).byte()
    sizes = torch.rand(5, scales, generator=generator)
    middles = torch.randint(levels, (5, scales), generator=generator).byte() if zeros else None
    form = Format(kind, 32, zeros=zeros)  # type: ignore[arg-type]
    blocks = blocks_of(steps, sizes, middles, form)
    parts = [blocks.part(which).shape for which in range(2 + zeros)]
    assert [*map(tuple, parts)] == [*form.shapes(5, inputs)]
    times = inputs // scales
    middle = torch.full((5, scales), levels // 2) if middles is None else middles
    expected = (steps.float() - middle.repeat_interleave(times, 1)) * sizes.repeat_interleave(
        times, 1
    )
    assert torch.equal(dequantise(blocks, (5, inputs), torch.float32), expected)
    beyond = dequantise(blocks, (5, 128), torch.float32)[:, inputs:]
    assert not beyond.any()


def test_halves_of_8_bits_are_4_bits_of_twice_the_inputs() -> None:
    steps = torch.randint(256, (3, 70), generator=torch.Generator().manual_seed(2)).byte()
    scales, zeros = torch.rand(3, 1), torch.tensor([[128], [0], [37]]).byte()
    form = Format("int8", 32, zeros=True, halves=True)
    blocks = blocks_of(steps, scales, zeros, form)
    assert [tuple(blocks.part(i).shape) for i in range(3)] == [*form.shapes(3, 70)]
    high, low = dequantise(blocks, (3, 192), torch.float64).chunk(2, 1)
    expected = (steps.double() - zeros) * scales.double()
    torch.testing.assert_close((high + low)[:, :70], expected, rtol=1e-6, atol=0)
    assert not (high + low)[:, 70:].any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_names_tell_the_format(kind: str, transposed: bool, zeros: bool) -> None:
    form = Format(kind, GROUPS[kind], transposed, zeros)  # type: ignore[arg-type]
    names = form.names("decoder.block.0.layer.0.SelfAttention.q.weight")
    for which, name in enumerate(names):
        assert parse(name) == ("decoder.block.0.layer.0.SelfAttention.q.weight", form, which)
    assert parse("lm_head.weight") is None
