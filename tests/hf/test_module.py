"""The life of an engine in a model: weights by pointer, and right results after every change."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgen
from fastgen.engines import NoEngine
from tests.configs import TINY, Pair, build_pair, fast_class, stock_class
from tests.helpers import (
    assert_equal_logits,
    assert_left_to_torch,
    assert_served,
    copies,
    logits,
    refusal,
    sources,
    targets,
)

Change = Callable[[Any], Any]


def engines(model: Any) -> dict[str, Any]:
    """All engines of a model, compiled."""
    model.compile_engine()
    decoder = model._current_engine()
    return {
        "encoder": model.encoder._current_engine().engine,
        "cross": decoder.cross,
        "decoder": decoder.decoder(False, 64),
        "decoder with slot mask": decoder.decoder(True, 64),
    }


def head(out_features: int, bias: bool = False) -> torch.nn.Linear:
    """A new language model head, the same at each call."""
    torch.manual_seed(0)
    return torch.nn.Linear(TINY["d_model"], out_features, bias=bias)


# Weights by pointer


@pytest.mark.parametrize("name", ["t5-1.0", "t5-1.1", "umt5", "t5-shallow-decoder"])
def test_engines_read_the_parameters_of_the_model(name: str) -> None:
    model = copies(name).fast
    for graph, engine in engines(model).items():
        root = model.encoder if graph == "encoder" else model
        parameters = dict(root.named_parameters(remove_duplicate=False))
        pointers = engine.weight_pointers()
        assert pointers, graph
        for key, pointer in pointers.items():
            assert pointer == parameters[key].data_ptr(), f"{graph}: {key} was copied"


def test_every_parameter_is_read_by_some_engine() -> None:
    model = copies("t5-1.1").fast
    found = {pointer for e in engines(model).values() for pointer in e.weight_pointers().values()}
    assert found == {parameter.data_ptr() for parameter in model.parameters()}


def test_tied_embeddings_are_one_memory_in_all_engines() -> None:
    model = copies("t5-1.0").fast
    found = engines(model)
    place = model.shared.weight.data_ptr()
    assert found["encoder"].weight_pointers()["embed_tokens.weight"] == place
    assert found["decoder"].weight_pointers()["decoder.embed_tokens.weight"] == place
    assert found["decoder"].weight_pointers()["lm_head.weight"] == place


def test_weights_that_are_not_contiguous_become_so_and_stay_shared() -> None:
    pair = copies()
    weight = pair.fast.decoder.block[0].layer[0].SelfAttention.q.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert_served(pair)
    name = "decoder.block.0.layer.0.SelfAttention.q.weight"
    assert engines(pair.fast)["decoder"].weight_pointers()[name] == weight.data_ptr()


# Changes after which the engine still serves the model


@torch.no_grad()
def scale_in_place(model: Any) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.1)


@torch.no_grad()
def turn_position_bias_round(model: Any) -> None:
    """A weight that the decoder graph reads through a table."""
    model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(-1)


def load_scaled(model: Any, assign: bool = False) -> None:
    state = {name: 1.1 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def load_decoder(model: Any) -> None:
    state = {name: 1.1 * value for name, value in model.decoder.state_dict().items()}
    model.decoder.load_state_dict(state, assign=True)


def resize(model: Any, tokens: int) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(tokens, mean_resizing=False)


def smaller_head(model: Any, view: bool) -> None:
    """A head of fewer tokens at the very address of the old one, or elsewhere."""
    weight = model.lm_head.weight[:50]
    model.lm_head.weight = torch.nn.Parameter(weight if view else weight.clone())


def transpose_in_place(model: Any) -> None:
    """The same address, another layout."""
    weight = model.decoder.block[0].layer[0].SelfAttention.o.weight
    weight.data = weight.data.t()


def replace_head(model: Any) -> None:
    model.lm_head = head(TINY["vocab_size"])


def replace_embeddings(model: Any) -> None:
    torch.manual_seed(0)
    model.set_input_embeddings(torch.nn.Embedding(130, TINY["d_model"]))


def tie(model: Any) -> None:
    model.lm_head.weight = model.shared.weight


SERVED: dict[str, Change] = {
    "half and back": lambda model: model.half().float(),
    "to bfloat16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "to the same device": lambda model: model.to("cpu"),
    "in place": scale_in_place,
    "position bias in place": turn_position_bias_round,
    "load_state_dict": load_scaled,
    "load_state_dict by assignment": lambda model: load_scaled(model, assign=True),
    "load_state_dict of a part": load_decoder,
    "larger vocabulary": lambda model: resize(model, 120),
    "smaller vocabulary": lambda model: resize(model, 60),
    "head replaced": replace_head,
    "head cut to a view": lambda model: smaller_head(model, view=True),
    "head cut": lambda model: smaller_head(model, view=False),
    "weight transposed": transpose_in_place,
    "embeddings replaced": replace_embeddings,
    "tied": tie,
    "encoder layer dropped": lambda model: model.encoder.block.pop(1),
    "train and back": lambda model: model.train().eval(),
    "config": lambda model: setattr(model.config, "scale_decoder_outputs", True),
    "a buffer more": lambda model: model.register_buffer("extra", torch.ones(1)),
}


@pytest.mark.parametrize("invalidate", [False, True], ids=["noticed", "invalidated"])
@pytest.mark.parametrize("change", SERVED)
def test_the_engine_follows_a_change(change: str, invalidate: bool) -> None:
    pair = copies()
    for model in (pair.stock, pair.fast):
        SERVED[change](model)
    if invalidate:
        pair.fast.invalidate_engine()
    assert_served(pair)


def test_generation_follows_a_change() -> None:
    pair = copies()
    for change in (scale_in_place, replace_head, lambda model: resize(model, 60)):
        results = []
        for model in (pair.stock, pair.fast):
            change(model)
            results.append(model.generate(sources(), max_new_tokens=8, num_beams=2).tolist())
        assert results[0] == results[1]


@pytest.mark.parametrize("saved", [False, True])
def test_generation_follows_an_edit_of_its_encoder_that_torch_does_not_count(
    saved: bool, tmp_path: Path
) -> None:
    """After calls like it, which take the parts of a model that looks the same as they were."""
    pair, options = copies(), {"max_new_tokens": 8, "do_sample": False}
    if saved:  # packed in place of the file's pages
        pair.stock.save_pretrained(tmp_path)
        pair = Pair(
            *(type(model).from_pretrained(tmp_path).eval() for model in vars(pair).values())
        )
    pair.fast.engine_options = {"prepack": 1}
    for _ in range(2):
        before = pair.fast.generate(sources(), **options)
    for model in (pair.stock, pair.fast):
        model.encoder.block[1].layer[0].SelfAttention.v.weight.data.mul_(3)
    found, expected = (m.generate(sources(), **options) for m in (pair.fast, pair.stock))
    assert torch.equal(found, expected) and not torch.equal(found, before)


# Who serves while a part is not as it was


def test_the_engine_serves_again_once_a_hook_is_gone() -> None:
    pair = copies()
    hook = pair.fast.decoder.register_forward_hook(lambda *_: None)
    assert refusal(pair.fast) is not None
    hook.remove()
    assert_served(pair)


def test_a_part_in_training_mode_goes_to_torch() -> None:
    pair = copies()
    found = []
    for model in (pair.stock, pair.fast):
        model.decoder.train()  # dropout draws random numbers
        torch.manual_seed(0)
        found.append(logits(model))
    assert "training mode" in str(refusal(pair.fast))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=5e-4)


def test_training_runs_in_torch_and_its_result_on_the_engine() -> None:
    pair = copies()
    for model in (pair.stock, pair.fast):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
        model(input_ids=sources(), labels=targets()).loss.backward()
        optimizer.step()
        model.eval()
    assert_served(pair)


def test_gradients_flow_when_they_are_enabled() -> None:
    pair = copies()
    call = {"input_ids": sources(), "decoder_input_ids": targets()}
    for model in (pair.stock, pair.fast):
        model(**call).logits.square().mean().backward()
    for (name, expected), found in zip(
        pair.stock.named_parameters(), pair.fast.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-3, msg=name)
    with torch.enable_grad():
        assert "torch.no_grad()" in pair.fast.refusal(**call)
        pair.fast.requires_grad_(False)
        assert pair.fast.refusal(**call) is None


# Copies


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_weights_and_engines_of_its_own(how: Change) -> None:
    pair = copies()
    for module in pair.fast.modules():  # transformers' recording hooks, of other tests, cannot be
        module._forward_hooks.clear()  # pickled
    pair.fast.engine_options = {"min_bucket": 4}
    logits(pair.fast)
    found = how(pair.fast)
    assert type(found) is type(pair.fast)
    assert found.engine_options == pair.fast.engine_options
    places = [{p.data_ptr() for p in model.parameters()} for model in (found, pair.fast)]
    assert not places[0] & places[1]
    scale_in_place(pair.fast)
    assert_equal_logits(type(pair)(pair.stock, found))
    pointers = engines(found)["decoder"].weight_pointers().values()
    assert places[0] >= set(pointers)


# Options and choice


def test_options_may_change_later() -> None:
    pair = copies()
    pair.fast.engine_options = {"backend": "torch"}
    assert_left_to_torch(pair, "EngineOptions(backend='torch')")
    with pytest.raises(NoEngine, match="backend='torch'"):
        pair.fast.compile_engine()
    pair.fast.engine_options = None
    assert_served(pair)


@pytest.mark.parametrize("name", ["t5-1.0", "mt5", "umt5"])
def test_an_encoder_model_runs_on_the_engine(name: str) -> None:
    stock = stock_class(name).__name__.replace("ForConditionalGeneration", "EncoderModel")
    whole = build_pair(name).stock
    model = getattr(fastgen, f"Fast{stock}")(copy.deepcopy(whole.config)).eval()
    model.load_state_dict(whole.state_dict(), strict=False)
    model.compile_engine()
    mask = torch.ones_like(sources())
    mask[1, 4:] = 0
    with torch.no_grad():
        assert model.encoder.refusal(input_ids=sources(), attention_mask=mask) is None
        found = model(input_ids=sources(), attention_mask=mask).last_hidden_state
        expected = whole.encoder(sources(), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    pointer = model.encoder._current_engine().engine.weight_pointers()["embed_tokens.weight"]
    assert pointer == model.shared.weight.data_ptr()


def test_a_model_is_an_instance_of_its_stock_class() -> None:
    for name in ("t5-1.0", "mt5", "umt5"):
        assert issubclass(fast_class(name), stock_class(name))


@pytest.mark.parametrize("prepack", [0, 0.25, 1])
def test_packed_weights_follow_an_edit_in_place(prepack: float) -> None:
    pair = copies()
    pair.fast.engine_options = {"prepack": prepack}
    assert_served(pair)
    for model in (pair.fast, pair.stock):
        with torch.no_grad():
            model.encoder.block[0].layer[0].SelfAttention.q.weight.mul_(2)
            model.lm_head.weight.add_(0.01)
    assert_served(pair)
