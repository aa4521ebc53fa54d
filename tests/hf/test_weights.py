"""Changes of weights: each is seen at a glance, and reaches every engine."""

import copy
import functools
import math
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import multiprocessing
from torch.testing._internal.two_tensor import TwoTensor
from transformers import T5Config

import fastgen
from fastgen.engines import NoEngine
from fastgen.file_pages import FilePages, _told
from fastgen.hf.module import EngineModule
from fastgen.hf.weights import Glance, weights_state
from tests.configs import TINY, Pair, build_stock, fast_class, stock_class
from tests.helpers import assert_left_to_torch, assert_served, copies, sources, targets


def attention(model: Any) -> Any:
    return model.decoder.block[0].layer[0].SelfAttention


def turn(model: Any) -> None:
    attention(model).o.weight.data = attention(model).o.weight.data.t()


def reshape(model: Any) -> None:
    weight = model.lm_head.weight
    weight.data = weight.data.view(weight.shape[1], weight.shape[0])


def replace_table_of_parameters(model: Any) -> None:
    attention(model).o._parameters = {"weight": torch.nn.Parameter(torch.ones(2, 2))}


def replace_tables_one_after_the_other(model: Any) -> None:
    """By one that is equal, and only then edited."""
    module = attention(model).o
    module._parameters = dict(module._parameters)
    module._parameters["weight"] = torch.nn.Parameter(module.weight.detach().clone())


def turn_layers_around(model: Any) -> None:
    layers = model.decoder.block._modules
    layers["0"] = layers.pop("0")


def swap_layers(model: Any) -> None:
    layers = model.decoder.block._modules
    layers["0"], layers["1"] = layers["1"], layers["0"]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight + 1)),
    "data": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight + 1),
    "strides": turn,
    "shape": reshape,
    "table of parameters": replace_table_of_parameters,
    "parameter more": lambda m: m.encoder.register_parameter(
        "b", torch.nn.Parameter(sources()[0] / 1)
    ),
    "parameter gone": lambda m: setattr(attention(m).q, "weight", None),
    "module": lambda m: setattr(m, "lm_head", torch.nn.Linear(32, 96, bias=False)),
    "module more": lambda m: m.encoder.add_module("extra", torch.nn.Identity().eval()),
    "module gone": lambda m: m.decoder.block.pop(1),
    "module gone from within": lambda m: setattr(m.encoder, "dropout", None),
    "table of parameters, equal at first": replace_tables_one_after_the_other,
    "modules in another order": swap_layers,
    "names in another order": turn_layers_around,
    "class": lambda m: setattr(m.lm_head, "__class__", type("Mine", (torch.nn.Linear,), {})),
    "class of the whole": lambda m: setattr(m, "__class__", type("Mine", (type(m),), {})),
    "dtype": lambda m: m.half(),
    "hook": lambda m: m.decoder.register_forward_hook(print),
    "hook before": lambda m: attention(m).q.register_forward_pre_hook(print),
    "forward": lambda m: setattr(m.lm_head, "forward", print),
    "training": lambda m: m.decoder.dropout.train(),
    "number of a part": lambda m: setattr(m.decoder.final_layer_norm, "variance_epsilon", 0.5),
    "flag of a part": lambda m: setattr(attention(m), "has_relative_attention_bias", False),
    "number of the whole": lambda m: setattr(m, "model_dim", 8),
    "number gone": lambda m: delattr(attention(m), "n_heads"),
    "config": lambda m: setattr(m.config, "layer_norm_epsilon", 0.5),
    "list in a config": lambda m: m.config.kinds[0].append("wide"),
    "dict in a config": lambda m: m.config.ropes["outer"].update(factor=2),
}


def state(model: Any, versions: bool) -> Any:
    try:
        return weights_state(model, versions, own=EngineModule)
    except NoEngine as error:
        return str(error)


@pytest.mark.parametrize("change", CHANGES)
def test_a_glance_sees_what_the_weights_state_knows(change: str) -> None:
    model: Any = copies().fast
    model.config.kinds, model.config.ropes = [["narrow"]], {"outer": {"factor": 1}}
    before, glance = state(model, False), Glance(model, versions=False)
    assert glance.same(model)
    assert state(model, False) == before
    CHANGES[change](model)
    assert not glance.same(model)
    assert state(model, False) != before


def test_an_edit_in_place_is_seen_by_engines_that_copy_weights() -> None:
    model: Any = copies().fast
    glances = {versions: Glance(model, versions) for versions in (False, True)}
    with torch.no_grad():
        attention(model).q.weight.mul_(2)
    assert glances[False].same(model)
    assert not glances[True].same(model)


def test_a_parameter_of_one_number_in_place_of_an_equal_one_is_seen() -> None:
    model: Any = copies().fast
    model.scale = torch.nn.Parameter(torch.ones(1))
    glance = Glance(model, versions=False)
    assert glance.same(model)
    model.scale = torch.nn.Parameter(torch.ones(1))
    assert not glance.same(model)


def test_a_hook_in_place_of_another_is_seen() -> None:
    model: Any = copies().fast
    handle = model.decoder.register_forward_hook(print)
    glance = Glance(model, versions=False)
    handle.remove()
    model.decoder.register_forward_hook(repr)
    assert not glance.same(model)


def test_an_edit_that_a_decoder_call_has_seen_reaches_the_encoder_too() -> None:
    pair = copies()
    assert_served(pair)
    with torch.no_grad():
        hidden = pair.stock.encoder(sources())
        for model in (pair.stock, pair.fast):
            weight = model.encoder.block[0].layer[0].SelfAttention.q.weight
            weight.data = -3 * weight.data
        pair.fast(encoder_outputs=hidden, decoder_input_ids=targets())
    call = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (m.generate(sources(), **call) for m in (pair.fast, pair.stock))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_edits_behind_the_back_of_torch_are_seen() -> None:
    pair = copies()
    assert_served(pair)
    for model in (pair.fast, pair.stock):
        for weight in model.parameters():
            weight.data.mul_(0.9)  # no version tells
    assert_served(pair)


@pytest.mark.parametrize("prepack", [0.25, 1])
def test_an_edit_of_one_row_through_data_is_seen(prepack: float) -> None:
    """At the default options too, and of every matrix: no version tells of it."""
    pair = copies()
    pair.fast.engine_options = {"prepack": prepack}
    assert_served(pair)
    for model in (pair.fast, pair.stock):
        for weight in model.parameters():
            weight.data[1].mul_(-2)
    assert_served(pair)
    for model in (pair.fast, pair.stock):
        for weight in model.parameters():
            weight.data[:2] = weight.data[:2].flip(0)  # the same numbers in other places
    assert_served(pair)
    engine = pair.fast._engine
    assert_served(pair)
    assert pair.fast._engine is engine


@pytest.mark.skipif(not _told(), reason="the kernel does not tell of writes to pages")
@pytest.mark.parametrize("part", ["lm_head", "encoder.block.0.layer.0.SelfAttention.q"])
def test_an_edit_of_what_lies_in_a_file_is_seen(part: str, tmp_path: Path) -> None:
    """Such weights are packed without a pass over them in each call."""
    build_stock("t5-1.1").save_pretrained(tmp_path)
    made = (cls("t5-1.1").from_pretrained(tmp_path).eval() for cls in (stock_class, fast_class))
    pair = Pair(*made)
    assert_served(pair)
    assert all(isinstance(copy, FilePages) for copy in pair.fast._copies)
    engine = pair.fast._engine
    assert_served(pair)
    assert pair.fast._engine is engine
    for model in (pair.fast, pair.stock):
        numbers = model.get_submodule(part).weight.detach().numpy()
        numbers[3] *= -2
    assert_served(pair)


def share_storages(model: Any) -> None:
    for weight in model.parameters():
        weight.untyped_storage().share_memory_()


def send(model: Any) -> None:
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    with ThreadPool(1) as pool:  # a pipe holds less than a model
        received = pool.apply_async(queue.get)
        queue.put(model)
        received.get()


SHARED: dict[str, Callable[[Any], Any]] = {
    "model": lambda model: model.share_memory(),
    "storages": share_storages,
    "pickled": ForkingPickler.dumps,
    "sent": send,
}


@functools.cache
def large_enough() -> Pair:
    """Models with a weight of over 32 MiB, which is pages of its own: reading freed ones ends
    the process."""
    config = T5Config(**TINY | {"vocab_size": 33000, "d_model": 256})
    stock = transformers.T5ForConditionalGeneration(config).eval()
    fast = fastgen.FastT5ForConditionalGeneration(config).eval()
    fast.load_state_dict(stock.state_dict())
    return Pair(stock, fast)


@pytest.mark.parametrize("share", SHARED.values(), ids=SHARED)
def test_weights_may_move_to_shared_memory(share: Callable[[Any], Any]) -> None:
    """Their storages stay what they were, but for the memory in them, and the old one is freed."""
    fast: Any = copy.deepcopy(large_enough().fast)
    pair = Pair(large_enough().stock, fast)
    assert_served(pair)
    with torch.no_grad():
        call = {"input_ids": sources(), "decoder_input_ids": targets()}
        past = {name: getattr(pair, name)(**call).past_key_values for name in ("fast", "stock")}
        share(fast)
        further = {"attention_mask": None, "decoder_input_ids": targets()[:, :1]}
        hidden = pair.stock.encoder(sources())
        found, expected = (
            getattr(pair, name)(encoder_outputs=hidden, past_key_values=kept, **further).logits
            for name, kept in past.items()
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert_served(pair)
    decoder = fast._current_engine()
    places = {name: p.data_ptr() for name, p in fast.named_parameters(remove_duplicate=False)}
    pointers = decoder.decoder(False, 64).weight_pointers()
    assert pointers == {name: places[name] for name in pointers}


def test_a_config_may_hold_what_json_does_not() -> None:
    pair = copies()
    for model in (pair.fast, pair.stock):
        model.config.note = {"scale": np.float32(0.5), "range": math.inf, "names": {"a"}}
    pair.fast.invalidate_engine()
    assert_served(pair)


def other_activation(model: Any) -> None:
    model.decoder.block[0].layer[-1].DenseReluDense.act = torch.nn.ReLU().eval()


def other_norm(model: Any) -> None:
    norm = torch.nn.RMSNorm(TINY["d_model"], eps=0.5).eval()
    norm.weight.data.copy_(model.decoder.final_layer_norm.weight)
    model.decoder.final_layer_norm = norm


def other_epsilon(model: Any) -> None:
    model.decoder.final_layer_norm.variance_epsilon = 0.5


def wrap_head(model: Any) -> None:
    """As libraries of quantized or sharded tensors do."""
    weight = model.lm_head.weight.detach()
    wrapped = TwoTensor(weight.clone(), weight.clone())
    model.lm_head.weight = torch.nn.Parameter(wrapped, requires_grad=False)


def other_flag(model: Any) -> None:
    model.decoder.block[0].layer[0].SelfAttention.relative_attention_max_distance = 9


def other_width(model: Any) -> None:
    model.model_dim = 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_epsilon, "variance_epsilon=0.5"),
        (other_flag, "relative_attention_max_distance=9"),
        (other_width, "model_dim=8"),
    ],
)
def test_a_number_edited_after_the_first_call(change: Callable[[Any], None], reason: str) -> None:
    pair = copies("t5-1.0")
    assert_served(pair)
    for model in (pair.fast, pair.stock):
        change(model)
    assert_left_to_torch(pair, reason)


def test_a_config_edited_after_the_first_call() -> None:
    """The stock model has read it; what is built from it now would compute something else."""
    pair = copies()
    for field in ("layer_norm_epsilon", "relative_attention_max_distance"):
        for model in (pair.fast, pair.stock):
            setattr(model.config, field, 3 * getattr(model.config, field))
    assert_left_to_torch(pair, "where the config makes it")


def test_attributes_of_the_program_cost_no_engine() -> None:
    pair = copies()
    pair.fast.calls = 1
    assert_served(pair)
    engine = pair.fast._engine
    pair.fast.calls = pair.fast.encoder.calls = 2
    assert_served(pair)
    assert pair.fast._engine is engine


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_activation, "act is a ReLU"),
        (other_norm, "final_layer_norm is a RMSNorm"),
        (other_epsilon, "variance_epsilon=0.5"),
        (wrap_head, "TwoTensor"),
    ],
)
def test_parts_that_compute_something_else(change: Callable[[Any], None], reason: str) -> None:
    pair = copies()
    for model in (pair.fast, pair.stock):
        change(model)
    pair.fast.invalidate_engine()
    assert_left_to_torch(pair, reason)


def test_moving_to_where_a_model_is_keeps_its_engines() -> None:
    pair = copies()
    assert_served(pair)
    engines = pair.fast._engine, pair.fast.encoder._engine
    pair.fast.to("cpu").float()
    assert (pair.fast._engine, pair.fast.encoder._engine) == engines
    pair.fast.half()
    assert pair.fast._engine is None


def test_hooks_of_all_modules_go_to_torch() -> None:
    pair = copies()
    assert_served(pair)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output * 2 if isinstance(module, torch.nn.Linear) else None
    )
    try:
        assert_left_to_torch(pair, "hooks for the forward of all modules")
    finally:
        hook.remove()
    assert_served(pair)
