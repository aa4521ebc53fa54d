import pytest
import torch
import transformers

from fastgen.bench.floor import Floor, Machine, floor_of, measure_machine
from fastgen.bench.shapes import SHAPES, shape_config
from fastgen.bench.workload import Encoding, Workload

# Every tiny shape is 32 wide, with 2 layers, 4 heads of 8, 64 inner and 128 ids.
E, F, V, LAYERS = 32, 64, 128, 2
BATCH, PROMPT, NEW, BEAMS = 3, 10, 5, 2
WORKLOAD = Workload(batch=BATCH, prompt_tokens=PROMPT, new_tokens=NEW, beams=BEAMS)
ROWS = BATCH * BEAMS
KV = 2 * LAYERS * E  # elements of a token's keys and values


def floor(name, workload, dtype=torch.float32):
    model = getattr(transformers, SHAPES[name].stock)(shape_config(name)).to(dtype)
    return floor_of(model, workload, SHAPES[name].kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2_reads_its_weights_once_and_beams_share_the_prompt(dtype):
    layer = (E * 3 * E + 3 * E) + (E * E + E) + (E * 4 * E + 4 * E) + (4 * E * E + E) + 4 * E
    weights = LAYERS * layer + 2 * E + V * E  # the last norm, and the head, which is tied
    rows_of_tables = ROWS * E  # of positions; the ids' table is the head
    kept = BATCH * PROMPT + ROWS * (NEW - 1) / 2
    found = floor("gpt2-tiny", WORKLOAD, dtype)
    elements = weights + rows_of_tables + ROWS * V + kept * KV
    assert found.bytes == elements * dtype.itemsize
    seen = ROWS * (PROMPT + (NEW - 1) / 2)
    assert found.flops == 2 * ROWS * weights + 4 * LAYERS * E * seen


def test_t5_reads_its_source_and_no_weights_of_its_keys():
    layer = 4 * E * E + 2 * E * E + 2 * E * F + 3 * E  # cross-attention: q and o alone
    weights = LAYERS * layer + E + V * E
    rows_of_tables = ROWS * 4  # of the position bias: a number a head
    kept = ROWS * (1 + (NEW - 1) / 2) + BATCH * PROMPT
    found = floor("t5-tiny", WORKLOAD)
    assert found.bytes == 4 * (weights + rows_of_tables + ROWS * V + kept * KV)
    seen = ROWS * (1 + (NEW - 1) / 2 + PROMPT)
    assert found.flops == 2 * ROWS * weights + 4 * LAYERS * E * seen


def test_bart_counts_biases():
    self_attention, cross = 4 * (E * E + E), 2 * (E * E + E)
    layer = self_attention + cross + (E * F + F) + (F * E + E) + 6 * E
    weights = LAYERS * layer + 2 * E + V * E  # the norm of the embedding, and the head
    kept = ROWS * (1 + (NEW - 1) / 2) + BATCH * PROMPT
    found = floor("bart-tiny", WORKLOAD)
    assert found.bytes == 4 * (weights + ROWS * E + ROWS * V + kept * KV)


@pytest.mark.parametrize("ragged", [False, True])
def test_an_encoder_computes_for_real_tokens_and_pools_rows(ragged):
    workload = Encoding(batch=3, prompt_tokens=20, ragged=ragged)
    tokens, pairs = sum(workload.lengths), sum(length**2 for length in workload.lengths)
    layer = 4 * (E * E + E) + (E * F + F) + (F * E + E) + 4 * E
    weights, pooler = LAYERS * layer + 2 * E, E * E + E
    found = floor("bert-tiny", workload)
    tables = 3 * E  # words, positions and token types
    assert found.bytes == 4 * (weights + pooler + tokens * (tables + E))
    assert found.flops == 2 * tokens * weights + 2 * 3 * pooler + 4 * pairs * LAYERS * E
    assert (tokens < 60) is ragged


def test_t5_encoder_has_one_table_of_ids():
    found = floor("t5-tiny-encoder", Encoding(batch=2, prompt_tokens=7))
    weights = LAYERS * (4 * E * E + 2 * E * F + 2 * E) + E
    assert found.bytes == 4 * (weights + 14 * (E + 4 + E))
    assert found.flops == 2 * 14 * weights + 4 * 2 * 49 * LAYERS * E


def test_the_floor_is_what_takes_longer():
    machine = Machine(bytes_per_s=100.0, flops_per_s=1000.0)
    assert Floor(200, 1000).seconds(machine) == 2.0
    assert not Floor(200, 1000).computes(machine)
    assert Floor(200, 3000).seconds(machine) == 3.0
    assert Floor(200, 3000).computes(machine)
    assert machine.facts == {"copy_gb_per_s": 1e-7, "matmul_tflop_per_s": 1e-9}


def test_a_machine_is_measured_once_a_process():
    first = measure_machine("cpu", torch.float32)
    assert first.bytes_per_s > 1e7
    assert first.flops_per_s > 1e7
    assert measure_machine("cpu", torch.float32) is first
