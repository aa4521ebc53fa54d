"""A call on torch costs no more than stock's: what refuses a model is found again at once."""

import copy
import gc
import weakref
from typing import Any

import pytest

from fastgen.hf import module
from tests.configs import build_pair
from tests.helpers import assert_equal_logits, copies, logits, refusal, sources
from tests.surprises import SURPRISES, Adapted, generate


@pytest.mark.parametrize("case", [name for name in SURPRISES if name != "foreign module"])
def test_a_refusal_that_stands_is_not_looked_for_again(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = copies().fast
    SURPRISES[case][0](model)
    logits(model)
    generate(model)
    looks: list[Any] = []
    look, same = module.weights_state, module.Glance.same

    def look_at(root: Any, *arguments: Any, **named: Any) -> Any:
        looks.append(root)
        return look(root, *arguments, **named)

    def glance_at(glance: Any, root: Any) -> bool:
        looks.append(root)
        return same(glance, root)

    monkeypatch.setattr(module, "weights_state", look_at)
    monkeypatch.setattr(module.Glance, "same", glance_at)
    logits(model)
    generate(model)
    assert all(root is not model for root in looks), "but a stack, which may be served"


def test_generate_on_torch_is_the_stock_method_over_the_stock_cache() -> None:
    pair = copies()
    outputs = [
        m.double().generate(sources(), max_new_tokens=4, return_dict_in_generate=True)
        for m in (pair.stock, pair.fast)
    ]
    assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    caches = [out.get("past_key_values", out.get("cache")) for out in outputs]
    assert type(caches[0]) is type(caches[1])


def test_a_refusal_ends_with_its_cause() -> None:
    pair = copies()
    fast: Any = pair.fast
    attention = fast.decoder.block[0].layer[0].SelfAttention
    plain = attention.q
    for change, undo in (
        (lambda: fast.double(), lambda: fast.float().load_state_dict(pair.stock.state_dict())),
        (
            lambda: setattr(attention, "q", Adapted(plain).eval()),
            lambda: setattr(attention, "q", plain),
        ),
        (lambda: setattr(plain, "forward", plain.forward), lambda: delattr(plain, "forward")),
        (lambda: fast.decoder.dropout.train(), lambda: fast.eval()),
    ):
        change()
        assert refusal(fast) is not None
        assert refusal(fast) is not None
        undo()
        assert refusal(fast) is None
        assert_equal_logits(pair)


def test_nothing_keeps_a_refused_model_alive() -> None:
    model: Any = copy.deepcopy(build_pair("t5-1.1").fast).double()
    logits(model)
    generate(model)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()
