"""The KV cache: it keeps its bucket while it lives, and behaves as stock KV caches do."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache, EncoderDecoderCache

from fastgen.hf.cache import StaticKVCache
from fastgen.hf.contract import CACHE
from tests.configs import build_pair, prompts
from tests.helpers import CLOSE, copies, targets, tokens


def test_keys_keep_their_bucket_alive() -> None:
    """A caller's view must not be overwritten by the next call."""
    model = build_pair("t5-1.1").fast
    call = {"input_ids": tokens(2, 6, 1), "decoder_input_ids": tokens(2, 4, 2)}
    with torch.no_grad():
        past = model(**call)[CACHE]
        keys = past.self_attention_cache.layers[0].keys
        kept = keys.clone()
        del past
        model(**call | {"decoder_input_ids": tokens(2, 4, 3)})
    assert torch.equal(keys, kept)


def test_two_sequences_do_not_share_a_bucket() -> None:
    model = copy.deepcopy(build_pair("t5-1.1").fast)
    call = {"input_ids": tokens(2, 6, 1), "decoder_input_ids": tokens(2, 4, 2)}
    with torch.no_grad():
        first, second = model(**call)[CACHE], model(**call)[CACHE]
        assert first.bucket is not second.bucket
        gone = first.bucket
        del first
        third = model(**call)[CACHE]
    assert third.bucket is gone


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("fast_loop", [True, False])
def test_a_returned_cache_has_the_layers_of_a_stock_one(beams: int, fast_loop: bool) -> None:
    """As many as the encoder has: those that a shallower decoder lacks stay empty."""
    name = "t5-shallow-decoder"
    pair = copies(name)
    pair.fast.engine_options = {"fast_loop": fast_loop}
    call = {"max_new_tokens": 4, "num_beams": beams, "return_dict_in_generate": True}
    found = []
    for model in (pair.stock, pair.fast):
        past = model.generate(prompts(name), **call).past_key_values
        past = copy.deepcopy(past)
        caches = past.self_attention_cache, past.cross_attention_cache
        found.append([[layer.get_seq_length() for layer in cache.layers] for cache in caches])
        found[-1].append(dict(past.is_updated))
        with torch.no_grad():
            past = model(input_ids=prompts(name), decoder_input_ids=targets()[:1].repeat(4, 1))
        found[-1].append([len(past.past_key_values.self_attention_cache.layers)])
    assert found[0] == found[1]


# The same as stock KV caches, whatever is done in which order

ROWS = st.integers(1, 4)


@functools.cache
def with_small_buckets() -> Any:
    """A model whose sequences outgrow their bucket every few tokens."""
    model = copy.deepcopy(build_pair("t5-1.1").fast)
    model.engine_options = {"min_bucket": 4}
    return model


@functools.cache
def stock_reset_empties() -> bool:
    """Up to transformers 5.17 ``reset`` left zeros of the old length, of no use to anyone."""
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
    cache.reset()
    return cache.get_seq_length() == 0


class SameAsStock(RuleBasedStateMachine):
    """Drives both models over KV caches to which the same things happen."""

    def __init__(self) -> None:
        super().__init__()
        pair = build_pair("t5-1.1")
        self.models = {"stock": pair.stock, "engine": with_small_buckets()}
        self.steps = 0

    @initialize(rows=ROWS, padded=st.booleans(), seed=st.integers(0, 9))
    def start(self, rows: int, padded: bool, seed: int) -> None:
        self.caches: dict[str, Any] = {
            "stock": EncoderDecoderCache(DynamicCache(), DynamicCache()),
            "engine": StaticKVCache(2),
        }
        source, self.mask = tokens(rows, 7, seed), torch.ones(rows, 7, dtype=torch.int64)
        if padded:
            self.mask[0, 4:] = 0
        with torch.no_grad():
            self.hidden = self.models["stock"].encoder(source, attention_mask=self.mask)[0]
        self.decode(length=2, served="engine")

    @rule(length=st.sampled_from([1, 1, 1, 2, 5]), served=st.sampled_from(["engine", "torch"]))
    def decode(self, length: int, served: str) -> None:
        """Further tokens; ``torch`` lets the stock forward work on the engine's KV cache."""
        self.steps += 1
        prompt = tokens(len(self.hidden), length, self.steps)
        found = []
        for name, cache in self.caches.items():
            model = self.models["stock" if served == "torch" else name]
            with torch.no_grad():
                output = model(
                    encoder_outputs=(self.hidden,),
                    attention_mask=self.mask,
                    decoder_input_ids=prompt,
                    **{CACHE: cache},
                )
            assert output[CACHE] is cache
            found.append(output.logits)
        torch.testing.assert_close(found[1], found[0], **CLOSE)

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = len(self.hidden)
        chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
        for cache in self.caches.values():
            cache.reorder_cache(torch.tensor(chosen))
        self.select(chosen)

    @rule(data=st.data())
    def keep_rows(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.integers(0, len(self.hidden) - 1), min_size=1, max_size=4))
        for cache in self.caches.values():
            cache.batch_select_indices(torch.tensor(chosen))
        self.select(chosen)

    @precondition(lambda self: len(self.hidden) <= 2)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        for cache in self.caches.values():
            cache.batch_repeat_interleave(repeats)
        self.select([i // repeats for i in range(repeats * len(self.hidden))])

    def select(self, rows: list[int]) -> None:
        self.hidden, self.mask = self.hidden[rows], self.mask[rows]

    @precondition(lambda self: self.caches["stock"].get_seq_length() > 1)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        removed = data.draw(st.integers(0, self.caches["stock"].get_seq_length() - 1))
        for cache in self.caches.values():
            cache.crop(-removed)

    @rule(how=st.sampled_from([copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def replace_by_a_copy(self, how: Any) -> None:
        self.caches = {name: how(cache) for name, cache in self.caches.items()}
        assert isinstance(self.caches["engine"], StaticKVCache)

    @rule()
    def copy_and_go_on_with_the_original(self) -> None:
        """A copy must not see, or be seen by, what happens to the original."""
        twins = copy.deepcopy(self.caches)
        self.decode(length=1, served="engine")
        kept, self.caches = self.caches, twins
        self.decode(length=2, served="engine")
        self.caches = kept

    @precondition(lambda self: stock_reset_empties())
    @rule()
    def reset(self) -> None:
        for cache in self.caches.values():
            cache.reset()
        self.decode(length=1, served="engine")

    @invariant()
    def same_contents(self) -> None:
        stock, engine = self.caches["stock"], self.caches["engine"]
        assert len(engine) == len(stock)
        assert engine.get_seq_length() == stock.get_seq_length()
        assert engine.is_updated == stock.is_updated
        for kind in ("self_attention_cache", "cross_attention_cache"):
            for one, other in zip(
                getattr(engine, kind).layers, getattr(stock, kind).layers, strict=True
            ):
                assert one.get_seq_length() == other.get_seq_length()
                torch.testing.assert_close(one.keys, other.keys, **CLOSE)
                torch.testing.assert_close(one.values, other.values, **CLOSE)


SameAsStock.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestSameAsStock = SameAsStock.TestCase
