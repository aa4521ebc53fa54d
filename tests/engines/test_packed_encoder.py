"""An encoder over packed tokens, on the CPU: the launches recorded, computed by torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from fastgen.engines import NotFused
from fastgen.engines.fused import encoder as packed
from fastgen.engines.fused.packed_attention import Table
from fastgen.engines.fused.packed_described import Ids, Visible
from fastgen.engines.fused.packed_ops import PackedOps
from fastgen.engines.fused.packed_values import Buffer
from fastgen.execution import encoder as encoders
from fastgen.execution.encoder import Encoder
from fastgen.target import onnxruntime_cuda
from tests.configs import Pair
from tests.generation.emulate import gpu_paths
from tests.models.test_bert import CLOSE, assert_same, build, call, kept, stack_of

TARGET = onnxruntime_cuda("float32")


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with mock.patch("fastgen.hf.building.choose_target", lambda *_: TARGET), torch.no_grad():
        yield


def pair_of(head: str = "Model", variant: str = "tiny", **options: Any) -> Pair:
    return copy.deepcopy(build(head, variant, **options))  # what it builds here is its own


def engine_of(model: Any) -> Encoder:
    engine: Encoder = stack_of(model)._engine
    assert engine.fused is not None
    return engine


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("padding", [None, "full", "right", "left", "holes"])
@pytest.mark.parametrize("head", ["Model", "ForTokenClassification", "ForQuestionAnswering"])
def test_same_outputs(head: str, padding: str | None, captured: bool) -> None:
    pair = pair_of(head)
    with gpu_paths() if captured else nullcontext():
        for types in (False, True):
            assert_same(pair, head, call(head, padding, types))
    engine = engine_of(pair.fast)
    assert [size[:3] for size in engine._replays] == ([(96, 3, 32)] if captured else [])
    assert (engine._counted is None) == captured


@pytest.mark.parametrize("variant", ["relu", "tanh"])
def test_every_variant(variant: str) -> None:
    pair = pair_of("Model", variant)
    assert_same(pair, "Model", call("Model", types=True))
    engine_of(pair.fast)


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_padding_is_zeros_or_what_stock_computes(padding: str) -> None:
    mask = kept(padding)
    for skip in (True, False):
        pair = pair_of("Model", skip_padding=skip)
        expected, found = (m(**call("Model", padding))[0] for m in (pair.stock, pair.fast))
        if skip:
            computed = mask.clone()
            computed[:, 0] = True  # poolers read it
            assert torch.equal(found.any(-1), computed)
            torch.testing.assert_close(found[computed], expected[computed], **CLOSE)
        else:
            torch.testing.assert_close(found, expected, **CLOSE)


def test_what_runs_is_as_long_as_there_are_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of rows, where there are many; and a bound is enough where they are few."""
    monkeypatch.setattr(packed, "MOST_TOKENS", 12)
    pair, lengths = pair_of(), []
    run = packed.PackedBinding.run

    def spy(self: Any, piece: Any, size: Any, layers: Any = None) -> None:
        lengths.append((size.tokens, size.longest))
        run(self, piece, size, layers)

    monkeypatch.setattr(packed.PackedBinding, "run", spy)
    assert_same(pair, "Model", call("Model", "right"))
    assert lengths == [(9, 9), (9, 9), (9, 9)]
    monkeypatch.setattr(encoders, "CAPTURED_TOKENS", 1)
    lengths.clear()
    assert_same(pair, "Model", call("Model", "right"))
    assert lengths == [(9, 9), (6, 5)]


def test_pieces_are_of_whole_rows_and_alike() -> None:
    with mock.patch.object(packed, "MOST_TOKENS", 10):
        assert list(packed.pieces([3, 3, 3])) == [(0, 3, 9)]
        assert list(packed.pieces([6, 6, 6])) == [(0, 1, 6), (1, 2, 6), (2, 3, 6)]
        assert list(packed.pieces([30, 1])) == [(0, 1, 30), (1, 2, 1)]
        assert list(packed.pieces([4] * 4)) == [(0, 2, 8), (2, 4, 8)]


def test_an_edited_weight_is_seen() -> None:
    pair = pair_of("Model", prepack=0.0)  # on a CPU it would be a reason to build anew
    before = assert_same(pair, "Model", call("Model"))[0]
    engine = engine_of(pair.fast)
    for model in (pair.stock, pair.fast):
        model.encoder.layer[1].output.dense.weight.data.mul_(3)
        model.embeddings.LayerNorm.bias.add_(1)
    assert not torch.allclose(assert_same(pair, "Model", call("Model"))[0], before)
    assert engine_of(pair.fast) is engine


def test_scratch_is_the_same_for_all_layers() -> None:
    def pointers(variant: str) -> set[int]:
        pair = pair_of("Model", variant)
        pair.fast(**call("Model"))
        binding = engine_of(pair.fast)._counted
        assert binding is not None
        written = [b for each in binding._launches for b in each.writes if not b.made]
        return {buffer.tensor.data_ptr() for buffer in written}

    # of three layers, and of one, whose result is not kept apart from what it reads
    assert len(pointers("tiny")) == len(pointers("tanh")) + 1


# What is not served


def ops(width: int = 8, dtype: torch.dtype = torch.float32) -> PackedOps:
    weights = {"w": torch.ones(width, width), "n": torch.ones(width), "wide": torch.ones(9000)}
    return PackedOps(TARGET, {name: weight.to(dtype) for name, weight in weights.items()})


def named(name: str) -> Any:
    return SimpleNamespace(name=name)


W, N = named("w"), named("n")
TABLE = Table(torch.ones(2, 8), torch.tensor([0, 1, 1], dtype=torch.int32))


def streamed(op: PackedOps, additions: int = 0) -> Any:
    """A residual stream as it was before so many additions."""
    found: Any = op.embedding(Ids("input_ids"), W)
    x = op.rms_norm(found, N, 1e-6)
    for _ in range(additions):
        op.add_rms_norm(found, op.linear(x, W), N, 1e-6)
    return found


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda op, x: op.causal_bias(x, x), "causal_bias"),
        (lambda op, x: op.rms_norm(x, N, 1e-6), "as a residual stream"),
        (lambda op, x: op.position_table(W, [0, 1, 2], future=1), "one side"),
        (lambda op, x: op.position_bias(TABLE, None, Ids("input_ids"), -1, 1), "other tokens"),
        (lambda op, x: op.position_bias(TABLE, None, Ids(None), -2, 1), "a table of 1"),
        (lambda op, x: op.attention(*[op.linear(x, W)] * 3, bias=TABLE, heads=4), "8 heads for 4"),
        (lambda op, x: op.multiply(op.linear(x, W), op.linear(x, W)), "gate"),
        (lambda op, x: op.add_rms_norm(streamed(op), x, N, 1e-6), "no product"),
        (lambda op, x: op.add_rms_norm(streamed(op, 1), op.linear(x, W), N, 1e-6), "stream"),
        (lambda op, x: op.activation(op.linear(x, W), "quick_gelu"), "quick_gelu"),
        (lambda op, x: op.add(op.linear(x, W), op.linear(x, W)), "sums"),
        (lambda op, x: op.layer_norm(x, named("wide"), named("wide"), 1e-6), "8192"),
        (lambda op, x: op.linear(op.add_layer_norm(x, x, N, N, 1e-6)[0], W), "total"),
        (lambda op, x: op.attention(*[op.linear(x, W)] * 3, bias=x, heads=2), "beside the mask"),
        (lambda op, x: op.attention(*[op.linear(x, W)] * 3, bias=None, heads=8), "head size 1"),
        (lambda op, x: op.attention(x, x, x, None, 2), "three products"),
    ],
)
def test_what_no_kernel_computes_is_not_fused(use: Any, reason: str) -> None:
    with pytest.raises(NotFused, match=reason):
        use(ops(), Buffer(8))


def test_weights_of_another_dtype_are_not_fused() -> None:
    with pytest.raises(NotFused, match="float64"):
        ops(dtype=torch.float64).embedding(Ids("input_ids"), W)


def test_the_option_switches_it_off() -> None:
    fast: Any = pair_of("Model", fused_kernels=False).fast
    assert fast._fused_engine(TARGET, padding=False) is None
    fast.engine_options = None
    assert fast._fused_engine(TARGET, padding=False) is not None


def test_offsets_scales_and_one_matrix_for_three() -> None:
    """What BERT does not use: scaled and shifted embeddings, [in, out] weights, no bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"word": (11, 8), "place": (9, 8), "w": (8, 8), "n": (8,), "b": (8,)}
    weights = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}

    class Root:
        def named_parameters(self) -> Iterator[tuple[str, Any]]:
            return iter((name, SimpleNamespace(name=name)) for name in weights)

        def encode(self, op: Any, input_ids: Any, key_positions: Any, **_: Any) -> dict[str, Any]:
            word = op.embedding(input_ids, named("word"), scale=3.0)
            x = op.add(word, op.embedding(key_positions, named("place"), offset=2))
            x = op.layer_norm(x, named("n"), named("b"), 1e-5)
            y = op.linear(x, W, transposed=True, scale=0.5)
            attended = op.attention(y, y, y, Visible(), heads=2, scale=0.7)
            x = op.add_layer_norm(x, op.linear(attended, W), named("n"), named("b"), 1e-5)[1]
            return {"last_hidden_state": op.layer_norm(x, named("n"), named("b"), 1e-5)}

    engine = packed.PackedEngine(Root(), TARGET, torch.device("cpu"), weights, padding=False)
    ids = torch.tensor([[1, 10, 3, 0]])
    hidden = torch.empty(1, 4, 8)
    binding = engine.bind(4, 1)
    binding.run(engine.call(ids, None, hidden), binding.size(4, 1, 4))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (8,), weights["n"], weights["b"], 1e-5)

    x = norm(3 * weights["word"][ids] + weights["place"][2:6])
    y = (0.5 * x @ weights["w"]).unflatten(2, (2, 4)).transpose(1, 2)
    attended = ((0.7 * y @ y.mT).softmax(-1) @ y).transpose(1, 2).flatten(2)
    torch.testing.assert_close(hidden, norm(norm(x + attended @ weights["w"].T)), **CLOSE)


def test_what_changed_while_the_gpu_ran_is_seen() -> None:
    """The look at the weights comes after the launches: their results are given up then."""
    pair = pair_of("Model", prepack=0.0)
    assert_same(pair, "Model", call("Model"))
    for change in (
        lambda m: setattr(m.encoder.layer[0].output.dense, "bias", copied(m, 2.0)),
        lambda m: setattr(m.encoder.layer[0].output.dense.bias, "data", copied(m, 3.0).data),
        lambda m: m.encoder.layer[1].register_forward_hook(lambda *_: _[2] * 2),
    ):
        before = pair.fast(**call("Model"))[0]
        for model in (pair.stock, pair.fast):
            change(model)
        assert not torch.allclose(assert_same(pair, "Model", call("Model"))[0], before)
    assert "hooks" in str(pair.fast.refusal(**call("Model")))


def copied(model: Any, added: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(model.encoder.layer[0].output.dense.bias + added)


def test_sizes_that_come_and_go_are_captured_ever_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with gpu_paths():
        pair, made = pair_of("Model", max_cached_graphs=1), []
        captured = Encoder._captured

        def spy(self: Any, *arguments: Any) -> Any:
            made.append(arguments)
            return captured(self, *arguments)

        monkeypatch.setattr(Encoder, "_captured", spy)
        for count in (1, 2, 2, 3, 3, 3, 3, 4, 4):  # of captures of each size, after that many calls
            for rows in (1, 2):
                assert_same(pair, "Model", {n: v[:rows] for n, v in call("Model").items()})
            assert len(made) == 2 * count


def test_large_sizes_are_captured_when_they_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "CAPTURED_TOKENS", 1)
    monkeypatch.setattr("fastgen.execution.capturing.CAPTURED_TOKENS", 1)
    with gpu_paths():
        pair = pair_of()
        for count in range(6):
            assert_same(pair, "Model", call("Model", "right" if count % 2 else "left"))
            assert [size[:3] for size in engine_of(pair.fast)._replays] == (
                [(256, 3, 32)] if count > 2 else []
            )
