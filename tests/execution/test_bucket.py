"""Buckets: every tensor of a size, and the pool that they are leased from and come back to."""

import gc
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from fastgen.execution.bucket import Bucket, BucketPool, BucketSize
from fastgen.graphs.shape import Shape
from fastgen.hf.cache import StaticKVCache
from fastgen.target import Target, onnxruntime_cpu, onnxruntime_cuda, tensorrt

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
