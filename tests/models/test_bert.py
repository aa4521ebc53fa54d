"""BERT and its heads against the stock classes: an encoder's table of calls, and its life."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, BertModel

import fastgen
from fastgen.file_pages import _told
from fastgen.hf import trial
from fastgen.models.bert import faster_on_torch
from tests.configs import Pair
from tests.standard import cpu_target

HEADS = {
    "Model": {},
    "ForSequenceClassification": {"num_labels": 5},
    "ForTokenClassification": {"num_labels": 5},
    "ForQuestionAnswering": {"num_labels": 2},
    "ForMaskedLM": {},
    "ForNextSentencePrediction": {},
    "ForMultipleChoice": {},
}
TINY = {
    **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"intermediate_size": 48, "max_position_embeddings": 40},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "relu": {"hidden_act": "relu", "type_vocab_size": 3, "layer_norm_eps": 1e-5},
    "tanh": {"hidden_act": "gelu_new", "num_attention_heads": 2, "num_hidden_layers": 1},
}
LENGTHS = (9, 5, 1)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
TOKENS = ("ForTokenClassification", "ForMaskedLM")  # whose logits are one row a token


@functools.cache
def build(head: str, variant: str = "tiny", **options: Any) -> Pair:
    """One saved checkpoint with random weights as both classes, fp32 on the CPU."""
    stock_class: Any = getattr(transformers, f"Bert{head}")
    stock = stock_class(BertConfig(**TINY | VARIANTS[variant] | HEADS[head])).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in stock.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(("LayerNorm.weight" in key) + scale * noise)
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        fast_class = getattr(fastgen, f"FastBert{head}")
        fast = fast_class.from_pretrained(folder, engine_options=options or None)
        return Pair(stock_class.from_pretrained(folder).eval(), fast.eval())


def kept(kind: str) -> torch.Tensor:
    """Which of 9 tokens there are, [3, 9]: padded on the right, left, both sides, or not."""
    right = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    kinds = {"right": right, "left": right.flip(-1), "full": torch.ones_like(right)}
    kinds["holes"] = torch.stack([right[0], right[1].roll(2), right[1].flip(0)])
    return kinds[kind]


def call(head: str, padding: str | None = "right", types: bool = False) -> dict[str, Any]:
    """Arguments of a forward: token ids [3, 9], for choices [3, 2, 9]."""
    shape = (3, 9) if head != "ForMultipleChoice" else (3, 2, 9)
    generator = torch.Generator().manual_seed(1)
    given = {"input_ids": torch.randint(3, 96, shape, generator=generator)}
    if padding is not None:
        mask = kept(padding).long()
        given["attention_mask"] = mask if len(shape) == 2 else torch.stack([mask, mask.flip(0)], 1)
        given["input_ids"] = given["input_ids"] * given["attention_mask"]
    if types:
        given["token_type_ids"] = torch.randint(0, 2, shape, generator=generator)
    return given


def assert_same(pair: Pair, head: str, arguments: dict[str, Any]) -> Any:
    """All tensors of both models' outputs are close, but what only padding computes; the Fast
    output."""
    with torch.no_grad():
        expected, found = pair.stock(**arguments), pair.fast(**arguments)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    mask = arguments.get("attention_mask", torch.ones(()))

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        per_token = tensor.ndim == 3 and tensor.shape[:-1] == mask.shape
        return tensor[mask.bool()] if per_token else tensor

    for key, value in expected.items():
        both = (value, found[key])
        for right, own in zip(*both, strict=True) if isinstance(value, tuple) else [both]:
            assert own.dtype == right.dtype and own.shape == right.shape
            torch.testing.assert_close(seen(own), seen(right), **CLOSE)
    return found


def stack_of(model: Any) -> Any:
    return model if isinstance(model, BertModel) else model.bert


def served(pair: Pair, arguments: dict[str, Any]) -> None:
    with torch.no_grad():
        assert pair.fast.refusal(**arguments) is None
        assert pair.fast.explain(**arguments).path == "engine"
    assert stack_of(pair.fast)._engine is not None


# What every head gives


@pytest.mark.parametrize("types", [False, True], ids=["one type", "types"])
@pytest.mark.parametrize("padding", [None, "full", "right", "left", "holes"])
@pytest.mark.parametrize("head", HEADS)
def test_same_outputs(head: str, padding: str | None, types: bool) -> None:
    pair, arguments = build(head), call(head, padding, types)
    served(pair, arguments)
    assert_same(pair, head, arguments)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("states", [False, True], ids=["output", "states"])
def test_every_variant(variant: str, states: bool) -> None:
    pair = build("Model", variant)
    arguments = call("Model", types=True) | {"output_hidden_states": states}
    served(pair, arguments)
    found = assert_same(pair, "Model", arguments)
    count = pair.stock.config.num_hidden_layers + 1
    assert len(found.get("hidden_states", ())) == count * states


@pytest.mark.parametrize("head", HEADS)
def test_hidden_states_and_tuples(head: str) -> None:
    """By argument and by config, and without field names."""
    pair, arguments = build(head), call(head)
    assert_same(pair, head, arguments | {"output_hidden_states": True})
    with torch.no_grad():
        expected, found = (m(**arguments, return_dict=False) for m in (pair.stock, pair.fast))
    assert [t.shape for t in found] == [t.shape for t in expected]
    pair = copy.deepcopy(pair)
    for model in (pair.stock, pair.fast):
        model.config.output_hidden_states = True
    assert "hidden_states" in assert_same(pair, head, arguments)


@pytest.mark.parametrize("head", HEADS)
def test_the_model_inside_runs_on_the_engine(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise AssertionError("torch runs it")

    monkeypatch.setattr(transformers.models.bert.modeling_bert.BertEncoder, "forward", stop)
    with torch.no_grad():
        build(head).fast(**call(head))


def test_losses_are_those_of_the_stock_heads() -> None:
    whole = torch.randint(0, 5, (3, 9), generator=torch.Generator().manual_seed(4))
    tokens = whole.masked_fill(~kept("right"), -100)
    for head, labels in (
        ("ForSequenceClassification", {"labels": torch.tensor([0, 4, 2])}),
        ("ForTokenClassification", {"labels": tokens}),
        ("ForMaskedLM", {"labels": tokens}),
        ("ForNextSentencePrediction", {"labels": torch.tensor([0, 1, 1])}),
        ("ForMultipleChoice", {"labels": torch.tensor([0, 1, 1])}),
        ("ForQuestionAnswering", {"start_positions": whole[:, 0], "end_positions": whole[:, 1]}),
    ):
        arguments = call(head) | labels
        served(build(head), arguments)
        assert assert_same(build(head), head, arguments).loss > 0


# Padding


def test_padding_is_zeros_and_costs_no_product() -> None:
    """What computes is given the tokens there are, and those that poolers read."""
    fast = build("Model").fast
    for padding, tokens in (("right", 15), ("left", 17)):
        arguments = call("Model", padding)
        with torch.no_grad():
            hidden = fast(**arguments).last_hidden_state
        computed = hidden.any(-1)
        assert int(computed.sum()) == tokens
        assert bool((computed | ~arguments["attention_mask"].bool()).all())


@pytest.mark.skipif(not _told(), reason="the kernel does not tell of writes to pages")
def test_matrices_are_packed_by_one_engine_at_a_time() -> None:
    """Those that lie in a file are packed whole, by each engine that there is."""
    pair = build.__wrapped__("Model")
    encoder = pair.fast._current_engine()
    for padding in ("full", None, "right", "full", None):
        assert_same(pair, "Model", call("Model", padding))
        packs = [made.cache_info().currsize for made in (encoder._engine, encoder._packed)]
        assert packs == ([1, 0] if not encoder._packs_all else [0, 1])
    assert encoder._packs_all
    assert pair.fast._current_engine() is encoder
    pair = copy.deepcopy(pair)  # in memory of its own, where none is packed
    for padding in ("full", "right"):
        assert_same(pair, "Model", call("Model", padding))
    assert not pair.fast._engine._packs_all


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_padding_is_computed_where_it_is_asked_for(padding: str) -> None:
    """By the option, and for answers that are chosen among all tokens."""
    cases = ((build("Model", skip_padding=False), "Model", "last_hidden_state"),)
    cases += ((build("ForQuestionAnswering"), "ForQuestionAnswering", "start_logits"),)
    for pair, head, field in cases:
        arguments = call(head, padding, types=True)
        served(pair, arguments)
        with torch.no_grad():
            expected, found = (m(**arguments)[field] for m in (pair.stock, pair.fast))
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("skip_padding", [True, False])
def test_standard_graphs_compute_the_same(
    skip_padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT gets them, here run by ONNX Runtime."""
    monkeypatch.setattr("fastgen.hf.building.choose_target", lambda *_: cpu_target("float32"))
    pair = copy.deepcopy(build("Model", skip_padding=skip_padding))
    for states in (False, True):
        arguments = call("Model", types=True) | {"output_hidden_states": states}
        served(pair, arguments)
        assert_same(pair, "Model", arguments)
    assert not pair.fast._engine.target.contrib


# What torch serves


def test_refusals_say_what_torch_runs() -> None:
    fast: Any = build("Model").fast
    arguments = call("Model")
    with torch.no_grad():
        for given, reason in (
            ({"position_ids": torch.arange(9)[None]}, "position_ids"),
            ({"output_attentions": True}, "output_attentions"),
            ({"inputs_embeds": torch.ones(3, 9, 32)}, "inputs_embeds"),
            ({"encoder_hidden_states": torch.ones(3, 9, 32)}, "encoder_hidden_states"),
            ({"attention_mask": torch.ones(3, 1, 9, 9)}, "attention_mask"),
            ({"attention_mask": kept("right").long() * 0}, "hides all of a row"),
            ({"token_type_ids": torch.zeros(1, 9, dtype=torch.int64)}, "one per token"),
            ({"token_type_ids": torch.full((3, 9), 2)}, "0 .. 1"),
            ({"input_ids": torch.ones(3, 41, dtype=torch.int64), "attention_mask": None}, "40"),
            ({"unheard_of": 1}, "unheard_of"),
        ):
            assert reason in str(fast.refusal(**arguments | given)), given
    assert "gradients" in fast.refusal(**arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"position_ids": torch.arange(8, -1, -1)[None]},
        {"attention_mask": torch.tril(torch.ones(3, 1, 9, 9)).bool()},
        {"attention_mask": kept("right").long() * torch.tensor([[1], [1], [0]])},
        {"token_type_ids": torch.ones(1, 9, dtype=torch.int64)},
        {"attention_mask": torch.ones(3, 4)},
        {"input_ids": None, "inputs_embeds": torch.ones(3, 9, 32)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_torch_gives_what_stock_gives(changes: dict[str, Any]) -> None:
    pair, arguments = build("Model"), call("Model") | changes
    with torch.no_grad():
        assert pair.fast.refusal(**arguments) is not None
        expected, found = (m(**arguments) for m in (pair.stock, pair.fast))
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, **CLOSE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_ids": None},
        {"inputs_embeds": torch.ones(3, 9, 32)},
        {"input_ids": torch.full((3, 9), 96)},
        {"input_ids": torch.ones(3, 41, dtype=torch.int64), "attention_mask": None},
        {"token_type_ids": torch.full((3, 9), 2)},
        {"token_type_ids": torch.zeros(3, 4, dtype=torch.int64)},
    ],
    ids=str,
)
def test_wrong_arguments_give_the_error_of_torch(wrong: dict[str, Any]) -> None:
    pair, arguments = build("Model"), call("Model") | wrong
    with torch.no_grad(), pytest.raises(Exception) as expected:
        pair.stock(**arguments)
    with torch.no_grad(), pytest.raises(expected.type):
        pair.fast(**arguments)


def test_a_decoder_is_left_to_torch() -> None:
    config = BertConfig(**TINY, is_decoder=True, add_cross_attention=True)
    stock = BertModel(config).eval()
    fast = fastgen.FastBertModel(config).eval()
    fast.load_state_dict(stock.state_dict())
    arguments = {"input_ids": call("Model", None)["input_ids"], "use_cache": False}
    with torch.no_grad():
        assert "as a decoder" in fast.refusal(**arguments)
        assert torch.equal(fast(**arguments)[0], stock(**arguments)[0])


# The life of a model


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForMaskedLM"])
def test_life_of_a_model(head: str, tmp_path: Path) -> None:
    """Options, copies, pickles, checkpoints, an edit of the weights and a way back to torch."""
    pair, arguments = copy.deepcopy(build(head)), call(head, types=True)
    fast: Any = pair.fast
    fast.compile_engine()
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [f"Bert{head}"]
    assert type(fast).__name__ == f"Bert{head}" and repr(fast).startswith(f"FastBert{head}(")
    with torch.no_grad():
        expected = fast(**arguments)[0]
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert type(other) is type(fast)
            torch.testing.assert_close(other(**arguments)[0], expected)
        options = {"backend": "torch"}
        other = type(fast).from_pretrained(tmp_path, engine_options=options).eval()
        assert "backend='torch'" in other.refusal(**arguments)
        seen = arguments["attention_mask"].bool() if expected.ndim == 3 else slice(None)
        torch.testing.assert_close(other(**arguments)[0][seen], expected[seen], **CLOSE)
        for model in (pair.stock, fast):
            stack_of(model).encoder.layer[1].output.dense.bias.add_(0.5)
    edited = assert_same(pair, head, arguments)
    assert not torch.allclose(edited[0], expected)


def test_without_a_pooler() -> None:
    pair = build("Model")
    fast = fastgen.FastBertModel(pair.stock.config, add_pooling_layer=False).eval()
    stock = BertModel(pair.stock.config, add_pooling_layer=False).eval()
    fast.load_state_dict(stock.state_dict())
    served(Pair(stock, fast), call("Model"))
    assert assert_same(Pair(stock, fast), "Model", call("Model")).pooler_output is None


def test_another_pooler_is_stock_code() -> None:
    for changed in (
        lambda pooler: setattr(pooler, "activation", torch.nn.ReLU()),
        lambda pooler: setattr(pooler, "dense", torch.nn.Linear(32, 7)),
        lambda pooler: setattr(pooler, "dense", torch.nn.Linear(32, 32, bias=False)),
    ):
        pair = copy.deepcopy(build("Model"))
        assert_same(pair, "Model", call("Model"))
        assert pair.fast._engine.pooling is not None
        torch.manual_seed(0)
        for model in (pair.stock, pair.fast):
            changed(model.pooler)
            model.eval()
        pair.fast.pooler.load_state_dict(pair.stock.pooler.state_dict())
        served(pair, call("Model"))
        assert_same(pair, "Model", call("Model"))
        assert pair.fast._engine.pooling is None


def test_gradients_reach_the_weights() -> None:
    pair = copy.deepcopy(build("ForSequenceClassification"))
    arguments = call("ForSequenceClassification") | {"labels": torch.tensor([0, 1, 2])}
    for model in (pair.stock, pair.fast):
        model(**arguments).loss.backward()
    own = dict(pair.stock.named_parameters())
    for key, parameter in pair.fast.named_parameters():
        torch.testing.assert_close(parameter.grad, own[key].grad)


def test_a_version_not_met_is_tried() -> None:
    assert trial._try(fastgen.FastBertModel) == {"forward": "fast loop"}


@pytest.mark.parametrize(
    ("device", "size", "torch_serves"),
    [
        ("cpu", (64, 512), False),
        ("cuda", (1, 128), False),
        ("cuda", (64, 128), True),
    ],
)
def test_torch_serves_what_it_serves_sooner(
    device: str, size: tuple[int, int], torch_serves: bool
) -> None:
    reason = faster_on_torch(torch.device(device), *size)
    assert ("faster on a GPU" in reason) if torch_serves else reason is None
