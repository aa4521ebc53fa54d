"""Which processors a captured graph may hold: each really is a function of what the plan says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from fastgen.generation import plan as plans
from fastgen.generation.plan import ProcessorPlan, reads_set_of_tokens, runs_code_of_the_user
from tests.generation.calls import one_of

VOCABULARY = 40
LENGTHS = range(1, 17)
Maker = tuple[type, dict[str, Any]]

_fraction = st.floats(0.01, 0.99)
_keep = {"min_tokens_to_keep": one_of(1, 2, 5)}
_tokens = st.lists(one_of(*range(VOCABULARY)), min_size=1, max_size=4, unique=True)

#: The parameters of every processor type that the plan allows.
SCORES_ONLY: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    hf.TemperatureLogitsWarper: {"temperature": st.floats(0.1, 4.0)},
    hf.TopKLogitsWarper: {"top_k": one_of(1, 3, 10, 60), **_keep},
    hf.TopPLogitsWarper: {"top_p": _fraction, **_keep},
    hf.MinPLogitsWarper: {"min_p": _fraction, **_keep},
    hf.TypicalLogitsWarper: {"mass": _fraction, **_keep},
    hf.EpsilonLogitsWarper: {"epsilon": _fraction, **_keep},
    hf.SuppressTokensLogitsProcessor: {"suppress_tokens": _tokens},
    hf.InfNanRemoveLogitsProcessor: {},
    hf.LogitNormalization: {},
}
UNTIL_LENGTH: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    hf.MinLengthLogitsProcessor: {"min_length": one_of(*range(15)), "eos_token_id": _tokens},
    hf.MinNewTokensLengthLogitsProcessor: {
        "prompt_length_to_skip": one_of(1, 2, 5),
        "min_new_tokens": one_of(*range(1, 12)),
        "eos_token_id": _tokens,
    },
}
AT_LENGTH: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    hf.ForcedBOSTokenLogitsProcessor: {"bos_token_id": one_of(*range(VOCABULARY))},
    hf.ForcedEOSTokenLogitsProcessor: {
        "max_length": one_of(*range(2, 16)),
        "eos_token_id": _tokens,
    },
    hf.SuppressTokensAtBeginLogitsProcessor: {
        "begin_suppress_tokens": _tokens,
        "begin_index": one_of(1, 2, 5),
    },
}
READS_SET: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    hf.RepetitionPenaltyLogitsProcessor: {"penalty": st.floats(0.2, 4.0)}
}
ALLOWED = SCORES_ONLY | UNTIL_LENGTH | AT_LENGTH | READS_SET


def makers(kinds: dict[type, dict[str, st.SearchStrategy[Any]]]) -> st.SearchStrategy[Maker]:
    """A processor type of the table and its parameters."""
    return one_of(*kinds).flatmap(
        lambda kind: st.tuples(st.just(kind), st.fixed_dictionaries(kinds[kind]))
    )


def plan_of(*processors: Any) -> ProcessorPlan:
    return ProcessorPlan(list(processors), known={})


def scores(seed: int, excluded: float = 0.1) -> torch.Tensor:
    """Scores [3, VOCABULARY] as processors may meet them: some tokens are excluded already."""
    generator = torch.Generator().manual_seed(seed)
    found = 3 * torch.randn(3, VOCABULARY, generator=generator)
    found[torch.rand(3, VOCABULARY, generator=generator) < excluded] = float("-inf")
    return found


def ids(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (3, length), generator=generator)


def applied(processor: Any, tokens: torch.Tensor, *which: Any) -> torch.Tensor:
    """The processed scores as bits, so that NaN equals NaN and 0 is not -0."""
    return processor(tokens, scores(*which)).view(torch.int32)


def fixed(examples: int = 100) -> settings:
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None)


def test_every_allowed_type_is_swept() -> None:
    assert set(SCORES_ONLY) == set(plans._SCORES_ONLY)
    assert set(UNTIL_LENGTH) == set(plans._UNTIL_LENGTH)
    assert set(AT_LENGTH) == set(plans._AT_LENGTH)


@fixed(200)
@given(makers(SCORES_ONLY), one_of(*LENGTHS), one_of(*range(99)))
def test_scores_only_types_ignore_tokens(maker: Maker, length: int, seed: int) -> None:
    kind, parameters = maker
    processor = kind(**parameters)
    assert plan_of(processor).obstacle is None
    first = applied(processor, ids(1, seed), seed)
    assert torch.equal(first, applied(processor, ids(length, seed + 1), seed))
    assert torch.equal(first, applied(kind(**parameters), ids(length, seed), seed))  # no memory


@fixed()
@given(makers(UNTIL_LENGTH), one_of(*range(99)))
def test_span_types_change_where_the_phase_does(maker: Maker, seed: int) -> None:
    kind, parameters = maker
    processor = kind(**parameters)
    plan = plan_of(processor)
    results: dict[Any, torch.Tensor] = {}
    for length in LENGTHS:
        result = applied(processor, ids(length, seed), seed, 0.0)
        assert torch.equal(result, applied(processor, ids(length, seed + 1), seed, 0.0))
        phase = plan.phase(length)
        assert phase is not None
        assert torch.equal(results.setdefault(phase, result), result)
    if len(results) == 2:
        assert not torch.equal(*results.values())


@fixed()
@given(makers(AT_LENGTH), one_of(*range(99)))
def test_types_of_one_length_act_where_there_is_no_phase(maker: Maker, seed: int) -> None:
    kind, parameters = maker
    processor = kind(**parameters)
    plan = plan_of(processor)
    inert = scores(seed, 0.0).view(torch.int32)
    for length in LENGTHS:
        result = applied(processor, ids(length, seed), seed, 0.0)
        if plan.phase(length) is None:
            assert not torch.equal(result, inert)
        else:
            assert torch.equal(result, inert)


@fixed()
@given(makers(READS_SET), one_of(*LENGTHS), one_of(*range(99)))
def test_set_readers_do_not_see_repeats(maker: Maker, length: int, seed: int) -> None:
    kind, parameters = maker
    processor = kind(**parameters)
    assert reads_set_of_tokens(processor)
    assert plan_of(processor).obstacle is None
    filled = ids(length, seed)
    repeats = filled[:, :1].expand(-1, 32 - length)
    padded = torch.cat((filled, repeats), dim=1)
    assert torch.equal(applied(processor, filled, seed), applied(processor, padded, seed))


@fixed()
@given(st.lists(makers(ALLOWED), max_size=4), one_of(*range(99)))
def test_process_is_the_processors_at_every_length_of_a_phase(
    chosen: list[Maker], seed: int
) -> None:
    processors = [kind(**parameters) for kind, parameters in chosen]
    plan = plan_of(*processors)
    captured: dict[Any, Any] = {}
    for length in LENGTHS:
        phase = plan.phase(length)
        if phase is None:
            continue
        tokens = torch.zeros(3, 32, dtype=torch.int64)  # what the first capture named stays
        view, buffer = captured.setdefault(phase, (ids(length, seed), tokens))
        filled = ids(length, seed + length)
        buffer[:] = filled[:, :1]
        buffer[:, :length] = filled
        found = plan.process(view, lambda buffer=buffer: buffer)(scores(seed))
        expected = hf.LogitsProcessorList(processors)(filled, scores(seed))
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("kind", ALLOWED, ids=lambda kind: kind.__name__)
def test_subclasses_are_refused(kind: type) -> None:
    processor = object.__new__(type("Mine", (kind,), {}))
    processor.prompt_ignore_length = None
    assert plan_of(hf.LogitNormalization(), processor).obstacle == "Mine"


@pytest.mark.parametrize(
    "processor",
    [
        hf.NoRepeatNGramLogitsProcessor(2),
        hf.NoBadWordsLogitsProcessor([[5]]),
        hf.SequenceBiasLogitsProcessor({(5,): 1.0}),
        hf.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=2),
        hf.EncoderRepetitionPenaltyLogitsProcessor(1.5, torch.ones(1, 2, dtype=torch.int64)),
        hf.ExponentialDecayLengthPenalty((2, 1.1), torch.tensor([1]), 1),
        hf.EtaLogitsWarper(0.1),  # its check of probabilities waits for the GPU
        hf.PrefixConstrainedLogitsProcessor(lambda row, ids: [1], 1),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_readers_of_sequences_are_refused(processor: Any) -> None:
    plan = plan_of(hf.TopKLogitsWarper(3), processor)
    assert plan.obstacle == type(processor).__name__


def test_code_of_the_user_is_known() -> None:
    prefixes = hf.PrefixConstrainedLogitsProcessor(lambda row, ids: [1], 1)
    subclass = type("Mine", (hf.LogitNormalization,), {})()
    assert all(map(runs_code_of_the_user, (prefixes, subclass, lambda ids, scores: scores)))
    assert not any(map(runs_code_of_the_user, (hf.LogitNormalization(), hf.TopKLogitsWarper(3))))


@fixed(150)
@given(makers(ALLOWED), st.data())
def test_signatures_are_equal_where_parameters_are(maker: Maker, data: Any) -> None:
    kind, parameters = maker
    others = data.draw(st.fixed_dictionaries(ALLOWED[kind]))
    changed = data.draw(st.sets(st.sampled_from(sorted(parameters)))) if parameters else set()
    others = {name: others[name] if name in changed else parameters[name] for name in parameters}
    first, same, other = (
        plan_of(kind(**arguments)).signature for arguments in (parameters, parameters, others)
    )
    assert first == same and hash(first) == hash(same)
    if others != parameters:
        # some parameters mean the same number inside the processor
        assume(vars_of(kind(**others)) != vars_of(kind(**parameters)))
        assert first != other


def vars_of(processor: Any) -> dict[str, Any]:
    """A processor's state with tensors as lists."""
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in vars(processor).items()
    }


def test_signatures_tell_types_apart() -> None:
    kinds = (hf.TopPLogitsWarper(0.5), hf.MinPLogitsWarper(0.5), hf.EpsilonLogitsWarper(0.5))
    assert len({plan_of(kind).signature for kind in kinds}) == 3


def test_known_tensors_are_not_read() -> None:
    """On a GPU reading a tensor waits; the caller knows the end tokens without it."""
    eos = torch.tensor([1, 7])
    processor = hf.MinLengthLogitsProcessor(5, eos)
    known = ProcessorPlan([processor], known={id(processor.eos_token_id): ("eos", "[1, 7]")})
    other = ProcessorPlan([processor], known={id(processor.eos_token_id): ("eos", "[1, 8]")})
    assert ("eos_token_id", ("eos", "[1, 7]")) in known.signature[0]
    assert known.signature != other.signature
