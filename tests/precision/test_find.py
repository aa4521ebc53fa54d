"""What ``find_unstable`` finds, of every family, and what it says of it."""

import re
from typing import Any

import pytest
import torch

from fastgen.errors import FastgenError
from fastgen.precision import Precision, find_unstable, passes
from tests import rotary
from tests.configs import build_pair
from tests.precision.overflowing import FAMILIES, scaled

BOUND = 0.03  # of a whole model's error: tiny random ones amplify rounding


def found_of(name: str, part: str = "", factor: float = 1.0, **more: Any) -> Precision:
    return find_unstable(scaled(name, part, factor), **more)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_overflows_is_kept_in_float32_and_the_model_is_near_to_float32(name: str) -> None:
    part, factor = FAMILIES[name]
    precision = found_of(name, part, factor)
    assert precision.errors.naive == float("inf"), "nothing overflows: the test shows nothing"
    assert precision.errors.found < BOUND and not precision.problems
    linears = {kept.name for kept in precision.kept if kept.kind == "linear"}
    assert linears and all(f".{name}.weight".endswith(part) for name in linears)
    overflown = [kept for kept in precision.kept if kept.loss == float("inf")]
    assert all(re.fullmatch(r"gives \S+: overflows", kept.reason) for kept in overflown)
    assert len(precision.kept) < precision.operations / 2
    assert {kept.name for kept in precision.kept} == {
        n for n in precision.wide if "product" not in n
    }


@pytest.mark.parametrize("name", ["t5-1.0", "t5-1.1", "mt5", "umt5"])
@pytest.mark.parametrize("part", [".wo.weight", ".o.weight"])
def test_the_rules_for_t5_are_its_answer(name: str, part: str) -> None:
    """The residual stream, and what is added to it: no more, and where it overflows no less."""
    precision = found_of(name, part, 3e4)
    kinds = {
        kept.name
        for kept in precision.kept
        if not kept.name.endswith(("layer_norm:sum", part[1:-7]))
    }
    assert not kinds
    assert precision.errors.found < BOUND
    assert precision.errors.found < 2 * precision.errors.rules


@pytest.mark.parametrize("name", [*FAMILIES, "flan", "bart-scales", "gpt2-sizes"])
def test_nothing_is_kept_of_a_model_that_float16_holds(name: str) -> None:
    precision = found_of(name)
    assert precision.kept == precision.wide == precision.problems == ()
    assert precision.casts == 0 and precision.operations > 20
    assert precision.errors.found == precision.errors.naive < BOUND


@pytest.mark.parametrize(("name", "part"), [("t5-1.0", ".wi.weight"), ("t5-1.1", ".wi_1.weight")])
def test_inside_the_feed_forward_the_answer_is_exact_where_the_rules_clamp(
    name: str, part: str
) -> None:
    precision = found_of(name, part, 2e4)
    assert {"activation", "multiply"} & {kept.kind for kept in precision.kept}
    assert precision.errors.found < BOUND < precision.errors.rules


def test_scores_that_rounded_queries_and_keys_blur() -> None:
    """Nothing overflows: the loss alone tells, and products in float32 mend it."""
    precision = found_of("bert", ".self.query.weight", 500, bound=0.02)
    reasons = {kept.name: kept.reason for kept in precision.kept}
    attention = "encoder.layer.0.attention.self:attention"
    assert reasons[attention].startswith("loses ")
    assert reasons["encoder.layer.0.attention.self.query"].startswith(f"{attention} loses ")
    assert "encoder.layer.0.attention.self.key:product" in precision.wide
    assert precision.errors.found < precision.errors.naive / 2


def test_keys_that_exceed_float16_are_a_problem() -> None:
    precision = found_of("t5-1.1", ".EncDecAttention.k.weight", 3e4)
    name = "decoder.block.0.layer.1.EncDecAttention.k"
    assert any(problem.startswith(f"{name} gives ") for problem in precision.problems)


@pytest.mark.parametrize("family", rotary.FAMILIES)
def test_rotary_positions_and_grouped_queries(family: str) -> None:
    _, model = rotary.pair(family, kv_heads=2)
    assert find_unstable(model).wide == ()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3e3)
    precision = find_unstable(model)
    assert precision.errors.naive == float("inf") and precision.errors.found < BOUND
    linears = [kept.name for kept in precision.kept if kept.kind == "linear"]
    assert linears == ["model.layers.0.mlp.down_proj"]


def test_more_headroom_keeps_more() -> None:
    few, many = (found_of("gpt2", ".mlp.c_proj.weight", 1e3, headroom=h) for h in (1.0, 1e3))
    assert not few.kept and many.kept
    assert all("too near to 65504" in kept.reason for kept in many.kept if kept.kind == "linear")


def test_given_inputs_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[35] *= 1e5
    ordinary = {"input_ids": torch.arange(10, 30)[None]}
    monkeypatch.setattr("fastgen.precision.find.random_batches", lambda config: [ordinary])
    assert not find_unstable(model).kept
    ids, mask = torch.arange(80).view(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    for inputs in (given, [ordinary, given], iter([given])):
        assert "transformer.wpe" in find_unstable(model, inputs).wide


@pytest.mark.parametrize("name", ["t5-1.1", "bart"])
def test_a_decoder_reads_labels_or_what_it_decodes(name: str) -> None:
    model = scaled(name)
    ids = torch.arange(3, 12)[None]
    given = passes.Passes(model, [{"input_ids": ids}, {"input_ids": ids, "labels": ids}])
    decoded, labelled = (batch["decoder_input_ids"] for batch in given.batches)
    assert decoded.tolist() == model.generate(ids, max_new_tokens=32).tolist()
    assert torch.equal(labelled, model.prepare_decoder_input_ids_from_labels(ids))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: build_pair("t5-1.1").stock, {}, "no Fast class: load it as FastT5For"),
        (lambda: scaled("gpt2"), {"bound": 0.0}, "bound=0.0.*between 0 and 1"),
        (lambda: scaled("gpt2"), {"headroom": 0.5}, "headroom=0.5.*at least 1"),
        (lambda: scaled("gpt2"), {"inputs": {}}, r"a batch of \[\] holds no token ids"),
    ],
)
def test_errors_say_what_is_allowed(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FastgenError, match=message):
        find_unstable(make(), **arguments)


def test_a_weight_beyond_float16_is_refused() -> None:
    model = scaled("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e6
    with pytest.raises(FastgenError, match=r"transformer.h.0.mlp.c_fc.weight exceeds float16.*bfl"):
        find_unstable(model)
