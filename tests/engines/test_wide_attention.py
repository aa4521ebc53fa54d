"""Which kernel serves attention of a step, and in which sizes, without a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastgen.bench.workload import Workload, standard_grid
from fastgen.engines.fused.wide_attention import Wide, choose
from tests.engines.test_fused import PUBLISHED, SHAPES, an_h100, record, size_of, two_layers

__all__ = ["an_h100"]  # a fixture

A_STEP = Wide(64, 32, 1, 12, 1, 1024, own=True, masked=False, turn="AS_IS")


def chosen(
    dtype: torch.dtype = torch.bfloat16, clusters: bool = True, **fields: Any
) -> Wide | None:
    return choose(dtype, replace(A_STEP, **fields), 132, clusters)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": torch.float32},
        {"head_size": 72},
        {"head_size": 256},
        {"queries": 20, "rows": 80},
        {"rows": 16},
    ],
    ids=str,
)
def test_what_is_left_to_the_kernel_of_few_rows(fields: dict[str, Any]) -> None:
    assert chosen() is not None
    assert chosen(**fields) is None


@pytest.mark.parametrize(
    ("rows", "heads", "slots", "splits"),
    [(32, 12, 1024, 1), (32, 2, 1024, 2), (20, 1, 2048, 4), (20, 1, 128, 1), (512, 32, 8192, 1)],
)
def test_a_cluster_shares_out_slots_where_processors_were_idle(
    rows: int, heads: int, slots: int, splits: int
) -> None:
    wide = chosen(rows=rows, heads=heads, slots=slots)
    assert wide is not None and wide.splits == splits
    assert splits == 1 or wide.grid[0] * wide.grid[1] <= 132


def test_blocks_without_clusters_share_out_nothing() -> None:
    wide = chosen(clusters=False, heads=2)
    assert wide is not None and wide.splits == 1


def test_queries_that_share_keys_are_one_blocks() -> None:
    together = {
        (queries, group): (wide.queries_together, wide.heads_together)
        for queries in (1, 4, 6, 12)
        for group in (1, 4, 7, 16)
        if (wide := chosen(queries=queries, rows=32 * queries, heads=112, group=group))
    }
    assert together[1, 1] == (1, 1) and together[4, 1] == (4, 1) and together[12, 1] == (6, 1)
    assert together[1, 16] == (1, 8) and together[4, 4] == (2, 4) and together[6, 7] == (1, 7)
    assert all(queries * heads <= 8 for queries, heads in together.values())


@pytest.mark.parametrize("workload", standard_grid(), ids=lambda workload: workload.title)
@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_of_the_benchmark(name: str, workload: Workload) -> None:
    """Many rows are served by it, in shared memory that every GPU served has."""
    ops = record(two_layers(name), size_of(workload, SHAPES[name].kind == "causal"))
    launches = [x for x in ops.launches if getattr(x, "kernel", "").startswith("wide_attention")]
    rows = workload.batch * workload.beams
    assert bool(launches) == (rows > 16)
    assert all(launch.shared_bytes <= 96 * 1024 for launch in launches)
