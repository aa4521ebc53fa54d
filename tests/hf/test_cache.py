"""The KV cache: buckets that are leased and reused, and the same behaviour as stock KV caches."""

import copy
import functools
import gc
import pickle
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache, EncoderDecoderCache

from fastgen.execution.bucket import Bucket, BucketPool, BucketSize
from fastgen.graphs.shape import Shape
from fastgen.hf.cache import StaticKVCache
from fastgen.hf.contract import CACHE
from fastgen.target import Target, onnxruntime_cpu, onnxruntime_cuda, tensorrt
from tests.configs import build_pair, prompts
from tests.helpers import CLOSE, copies, targets, tokens

SHAPE = Shape(
    layers=2, heads=3, head_size=4, width=8, vocab_size=11, tables={"position_table.0": (1, 3, 5)}
)
SIZE = BucketSize(batch=2, queries=1, slots=8, sources=6)
CPU = torch.device("cpu")
#: The buffers of a GPU's layout are plain tensors: their bookkeeping can be tested on the CPU.
TARGETS = {"cpu": onnxruntime_cpu(), "cuda layout": onnxruntime_cuda("float32")}
TARGETS["tensorrt"] = tensorrt("float32")


def pool(limit: int = 2, target: Target = TARGETS["cpu"]) -> BucketPool:
    return BucketPool(lambda size: Bucket(SHAPE, target, CPU, size), limit)


# Buckets and their pool


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_bucket_holds_every_tensor_of_its_size(target: Target) -> None:
    bucket = Bucket(SHAPE, target, CPU, SIZE)
    for i in range(SHAPE.layers):
        for kind in ("key", "value"):
            own, present = bucket.tensors[f"self_{kind}.{i}"], bucket.tensors[f"present_{kind}.{i}"]
            assert own.data_ptr() == present.data_ptr()  # updated in place
            assert own.is_contiguous()
            assert own.numel() == 2 * 3 * 8 * 4
            assert bucket.tensors[f"cross_{kind}.{i}"].numel() == 2 * 3 * 6 * 4
    assert bucket.layer(bucket.self_kv, 3, 5).shape == (2, 3, 5, 4)
    assert bucket.tensors["logits"].shape == (2, 1, 11)
    assert bucket.tensors["position_table.0"].shape == (1, 3, 5)


def test_where_one_graph_serves_all_a_step_without_beams_hides_no_slot() -> None:
    assert "slot_mask" not in Bucket(SHAPE, TARGETS["cuda layout"], CPU, SIZE).tensors
    mask = Bucket(SHAPE, TARGETS["tensorrt"], CPU, SIZE).tensors["slot_mask"]
    assert mask.shape == (2, 1, 1, 8)
    assert not mask.any()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_reorder_moves_rows_of_all_layers(target: Target) -> None:
    bucket = Bucket(SHAPE, target, CPU, SIZE)
    bucket.self_kv.normal_()
    bucket.cross_kv.normal_()
    before = [bucket.layer(bucket.self_kv, i, 5).clone() for i in range(4)]
    bucket.reorder(torch.tensor([1, 1]), 5)
    for i in range(4):
        assert torch.equal(bucket.layer(bucket.self_kv, i, 5), before[i][[1, 1]])


def test_what_a_gpu_reads_beyond_the_tokens_is_finite() -> None:
    """There attention reads all slots, and NaN survives a mask."""
    buckets = pool(target=TARGETS["cuda layout"])
    buckets.lease(SIZE).bucket.self_kv.fill_(torch.nan)
    assert buckets.lease(SIZE).bucket.self_kv.isfinite().all()


def test_growing_keeps_padded_sources_finite() -> None:
    """A bucket may hold more source tokens than the call has; attention reads them all the same."""

    def make(size: BucketSize) -> Bucket:
        bucket = Bucket(SHAPE, TARGETS["cuda layout"], CPU, size)
        bucket.cross_kv.fill_(torch.nan)  # as memory may be that others have used
        return bucket

    buckets, cache = BucketPool(make, 2), StaticKVCache(SHAPE.layers)
    cache.lease(buckets, SIZE, fresh=True).cross_kv.normal_()
    cache.fill(length=3, sources=SIZE.sources - 2)
    grown = cache.lease(buckets, SIZE._replace(slots=16))
    assert grown.size.slots == 16 and grown.cross_kv.isfinite().all()


def test_a_bucket_is_used_again_once_its_lease_ends() -> None:
    buckets = pool()
    lease = buckets.lease(SIZE)
    first = lease.bucket
    assert buckets.lease(SIZE).bucket is not first
    del lease
    assert buckets.lease(SIZE).bucket is first
    assert buckets.lease(SIZE._replace(slots=16)).bucket is not first


def test_idle_buckets_are_bounded_and_the_oldest_goes_first() -> None:
    buckets = pool(limit=2)
    alive = []
    for slots in (8, 16, 32, 8):
        lease = buckets.lease(SIZE._replace(slots=slots))
        alive.append(weakref.ref(lease.bucket))
        del lease
    gc.collect()
    assert len(buckets.idle()) == 2
    assert [bucket() is not None for bucket in alive] == [False, False, True, True]


def test_a_bucket_just_used_outlives_an_older_one() -> None:
    buckets = pool(limit=2)
    for slots in (8, 16):
        buckets.lease(SIZE._replace(slots=slots))
    kept = weakref.ref(buckets.lease(SIZE._replace(slots=8)).bucket)
    buckets.lease(SIZE._replace(slots=32))
    gc.collect()
    assert kept() is not None


def test_a_failed_allocation_frees_idle_buckets_and_tries_again() -> None:
    tried: list[int] = []

    def make(size: BucketSize) -> Bucket:
        tried.append(size.slots)
        if idle() is not None and size.slots > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return Bucket(SHAPE, TARGETS["cpu"], CPU, size)

    buckets = BucketPool(make, 4)
    idle: Any = lambda: None  # noqa: E731
    idle = weakref.ref(buckets.lease(SIZE).bucket)
    assert buckets.lease(SIZE._replace(slots=16)).bucket.size.slots == 16
    assert tried == [8, 16, 16]
    held = buckets.lease(SIZE)
    idle = weakref.ref(held.bucket)
    with pytest.raises(torch.OutOfMemoryError, match="1 GiB"):
        buckets.lease(SIZE._replace(slots=32))


def test_a_lease_ends_without_code_that_an_interrupt_could_land_in() -> None:
    """Memory is freed anywhere: what a signal's handler raises there is lost, and so was the
    bucket. The handler runs where Python code does, which a trace function sees."""
    buckets = pool()
    lease = buckets.lease(SIZE)
    bucket = weakref.ref(lease.bucket)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = sys.gettrace()
    with buckets._lock:  # a thread may be stopped here, and another free its lease meanwhile
        sys.settrace(interrupt)
        try:
            del lease
        finally:
            sys.settrace(before)
    assert buckets.idle() == [bucket()]


def test_a_lease_may_outlive_its_pool() -> None:
    lease = pool().lease(SIZE)
    bucket = weakref.ref(lease.bucket)
    gc.collect()
    assert bucket() is lease.bucket
    del lease
    gc.collect()
    assert bucket() is None


def test_leases_from_many_threads_are_never_of_one_bucket() -> None:
    buckets, in_use, failures = pool(limit=3), set(), []

    def work() -> None:
        for _ in range(200):
            lease = buckets.lease(SIZE)
            if id(lease.bucket) in in_use:
                failures.append(lease)
            in_use.add(id(lease.bucket))
            in_use.discard(id(lease.bucket))
            del lease

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Life of a lease


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
