"""Several calls of ``forward`` over one KV cache, against the stock class."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from fastgen.hf.cache import StaticKVCache
from fastgen.hf.contract import CACHE
from tests.configs import Pair, build_pair
from tests.helpers import CAUSAL, CLOSE, ragged, refusal, sources, targets, tokens

NAMES = (*CAUSAL, "t5-deep-decoder")


@torch.no_grad()
def forward(model: Any, **arguments: Any) -> Any:
    """A forward call of 3 rows, 9 source and 5 target tokens unless said."""
    call = {"input_ids": sources(), "decoder_input_ids": targets()} | arguments
    return model(**{name: value for name, value in call.items() if value is not ...})


def continued(
    model: Any,
    make_past: Callable[[], Any] = lambda: None,
    chunks: tuple[int, ...] = (2, 1, 1, 3, 1),
    mask: torch.Tensor | None = None,
    later_mask: Any = ...,
    between: Callable[[Any, Any, int], Any] = lambda model, past, step: past,
) -> torch.Tensor:
    """Logits of a decoder prompt given in chunks, the KV cache handed from call to call."""
    prompt = tokens(3, sum(chunks), seed=3)
    past, state, start, found = make_past(), None, 0, []
    for step, size in enumerate(chunks):
        given: dict[str, Any] = {"encoder_outputs": state} if state else {"input_ids": sources()}
        given["attention_mask"] = mask if step == 0 or later_mask is ... else later_mask
        given |= {"decoder_input_ids": prompt[:, start : start + size], CACHE: past}
        with torch.no_grad():
            output = model(**given, use_cache=True)
        state = (output.encoder_last_hidden_state,)
        past, start = between(model, output[CACHE], step), start + size
        found.append(output.logits)
    assert past.get_seq_length() == start
    return torch.cat(found, 1)


def foreign() -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def assert_continues(pair: Pair, **how: Any) -> None:
    """The Fast model continues as the stock model does without detours, and as one call would."""
    plain = {key: how[key] for key in ("chunks", "mask", "later_mask") if key in how}
    expected = continued(pair.stock, make_past=foreign, **plain)
    torch.testing.assert_close(continued(pair.fast, **how), expected, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_kv_cache_is_continued(name: str, side: str | None) -> None:
    assert_continues(build_pair(name), mask=ragged(side) if side else None)


@pytest.mark.parametrize("make_past", [foreign, lambda: StaticKVCache(2)], ids=["stock", "own"])
def test_a_kv_cache_of_the_callers(make_past: Callable[[], Any]) -> None:
    assert_continues(build_pair("t5-1.1"), make_past=make_past, mask=ragged())


def test_a_later_call_may_see_other_source_tokens() -> None:
    """Stock takes each call's own mask, although keys and values stay those of the first call."""
    pair = build_pair("t5-1.1")
    assert_continues(pair, mask=ragged(), later_mask=None)
    assert_continues(pair, mask=None, later_mask=ragged())
    assert_continues(pair, mask=ragged(), later_mask=ragged("left"))


def test_an_equal_mask_stays_on_the_engine() -> None:
    model = build_pair("t5-1.1").fast
    past = StaticKVCache(2)
    forward(model, **{CACHE: past})
    step = {"decoder_input_ids": targets()[:, :1], CACHE: past}
    assert refusal(model, **step) is None
    assert refusal(model, **step, attention_mask=torch.ones_like(sources())) is None
    assert "attention_mask" in str(refusal(model, **step, attention_mask=ragged()))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_engine_and_torch_take_turns_on_one_kv_cache(name: str) -> None:
    pair = copy.deepcopy(build_pair(name))

    def switch(model: Any, past: Any, step: int) -> Any:
        model.engine_options = {"backend": "torch" if step % 2 == 0 else "auto"}
        return past

    assert_continues(pair, between=switch, mask=ragged(), chunks=(2, 1, 1, 1, 3, 1, 1))


def test_a_kv_cache_outlives_its_engines() -> None:
    pair = copy.deepcopy(build_pair("t5-1.1"))

    def invalidate(model: Any, past: Any, step: int) -> Any:
        model.invalidate_engine()
        return past

    assert_continues(pair, between=invalidate, mask=ragged())


@pytest.mark.parametrize("name", CAUSAL)
def test_growing_past_buckets(name: str) -> None:
    pair = copy.deepcopy(build_pair(name))
    pair.fast.engine_options = {"min_bucket": 4}
    assert_continues(pair, chunks=(1, 2, 1, 1, 5, 1, 9, *[1] * 20), mask=ragged())
    for beams in (1, 3):
        call = {"attention_mask": ragged(), "max_new_tokens": 40, "min_new_tokens": 40}
        found, expected = (
            model.generate(sources(), **call, num_beams=beams) for model in (pair.fast, pair.stock)
        )
        assert found.tolist() == expected.tolist()
