"""The bytes of a step's launches, recorded on the CPU: only addresses are looked at."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import BartConfig, GPT2Config, T5Config

from benchmarks.kernels import kinds
from fastgen import (
    FastBartForConditionalGeneration,
    FastGPT2LMHeadModel,
    FastT5ForConditionalGeneration,
)
from fastgen.bench.floor import floor_of
from fastgen.bench.workload import Workload
from fastgen.blockwise import GROUPS, parse, quantise
from fastgen.engines.fused.engine import FusedEngine
from fastgen.engines.fused.ops import FusedOps
from fastgen.engines.fused.wide import WideOps
from fastgen.execution.bucket import Bucket, BucketSize
from fastgen.target import onnxruntime_cuda

E, HEADS, D, F, V, LAYERS = 32, 4, 16, 96, 128, 3
KV = HEADS * D
FILLED = 9  # slots before the step


@pytest.fixture
def gpu(monkeypatch):
    """What recording asks of a GPU."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.fixture
def model(gpu):
    sizes = {"d_model": E, "num_heads": HEADS, "d_kv": D, "d_ff": F, "vocab_size": V}
    config = T5Config(**sizes, num_layers=LAYERS, decoder_start_token_id=0)
    return FastT5ForConditionalGeneration(config)


class Parameters(dict):
    """A model's own, and what is made of them in fewer bits."""

    def __missing__(self, name):
        parameter, form, _ = parse(name)
        weight = self[parameter].detach()
        blocks = quantise(weight.T if form.transposed else weight, form.kind, form.group)
        self |= dict(zip(form.names(parameter), (blocks.values, blocks.scales), strict=True))
        return self[name]


def recorded(model, vocabulary, size, filled=FILLED, weights="full"):
    """What a step over a bucket of this size is recorded as, and the bucket."""
    root, dtype = model._decoder_root(), str(model.dtype).removeprefix("torch.")
    target = replace(onnxruntime_cuda(dtype), weights=weights, group=GROUPS.get(weights, 0))
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    engine = FusedEngine(root, target, Parameters(parameters))
    bucket = Bucket(root.shape, target, torch.device("cpu"), size)
    bucket.tensors["first_slot"].fill_(filled)
    ops = vocabulary(target, engine._parameters, bucket.tensors)
    inputs = {name: tensor for name, tensor in bucket.tensors.items() if name != "logits"}
    results = root.decode(ops, **inputs)
    ops.store(results["logits"], bucket.tensors["logits"])
    return kinds(ops, [lambda stream: None] * len(ops.launches)), ops, bucket


def attention_bytes(found, own):
    """Bytes of each attention: the step's own slots', or the source's."""
    (size,) = {
        kind.bytes / len(kind.runs)
        for name, kind in found.items()
        if name.startswith("attention") and name.split(", ")[5] == str(own).lower()
    }
    return size


def test_all_launches_have_a_kind(model):
    found, ops, _ = recorded(model, FusedOps, BucketSize(1, 1, 64, 32))
    assert sum(len(kind.runs) for kind in found.values()) == len(ops.launches)
    assert len(found["embedding"].runs) == 1
    kinds_of_layers = [kind for kind in found.values() if len(kind.runs) % LAYERS == 0]
    assert len(kinds_of_layers) >= 5


def test_self_attention_reads_filled_slots_and_writes_new_ones(model):
    batch, queries, slots = 2, 2, 64
    found, _, bucket = recorded(model, FusedOps, BucketSize(batch, queries, slots, 32))
    rows, seen = batch * queries, FILLED + queries
    kv = 2 * batch * seen * KV + 2 * rows * KV
    attended = 3 * rows * KV + rows * KV  # q, k, v in, the result out
    mask = batch * queries * seen
    table = next(bucket.tensors[name] for name in bucket.shape.tables)
    integers = 8 * (seen + queries + batch)  # positions of slots and queries, first slots
    expected = 4 * (kv + attended + mask) + table.nbytes + integers
    assert attention_bytes(found, own=True) == expected


def test_cross_attention_reads_all_of_the_source(model):
    batch, sources = 2, 32
    found, _, _ = recorded(model, FusedOps, BucketSize(batch, 1, 64, sources))
    elements = 2 * batch * sources * KV + 2 * batch * KV + batch * sources  # k, v; q, y; mask
    assert attention_bytes(found, own=False) == 4 * elements


def test_embedding_reads_a_row_for_each_token(model):
    found, _, _ = recorded(model, FusedOps, BucketSize(3, 1, 64, 32))
    assert found["embedding"].bytes == 3 * (8 + 4 * E + 4 * E)  # id, its row, the residual stream


@pytest.mark.parametrize(("vocabulary", "rows"), [(FusedOps, 2), (WideOps, 20)])
def test_products_read_each_weight_once(model, vocabulary, rows):
    found, _, _ = recorded(model, vocabulary, BucketSize(rows, 1, 64, 32))
    inside = vocabulary is FusedOps  # norms are part of the products that read them

    def product(inputs, outputs, count=1, normed=False, added=False):
        norm = inputs if normed and inside else 0
        reads = inputs if inside else inputs * count  # together, or one after the other
        written = outputs * (2 if added else 1)
        return count * inputs * outputs + norm + rows * (reads + count * written)

    layer = product(E, KV, 3, normed=True) + 2 * product(KV, E, added=True)
    layer += product(E, KV, normed=True) + product(E, F, normed=True) + product(F, E, added=True)
    expected = LAYERS * layer + product(E, V, normed=True)
    products = [k.bytes for n, k in found.items() if n.startswith(("linear", "cuBLAS"))]
    assert sum(products) == 4 * expected
    norms = [kind for name, kind in found.items() if name.startswith("norm")]
    assert sum(kind.bytes for kind in norms) == (not inside) * 4 * (3 * LAYERS + 1) * (
        2 * rows * E + E
    )


def test_what_is_added_is_read_and_written(model):
    found, _, _ = recorded(model, WideOps, BucketSize(20, 1, 64, 32))
    added = found[f"cuBLAS<{KV}, {E}, ADD>"]
    assert len(added.runs) == 2 * LAYERS  # of self- and of cross-attention
    assert added.bytes == 2 * LAYERS * 4 * (20 * KV + KV * E + 2 * 20 * E)
    stored = found[f"cuBLAS<{E}, {V}, STORE>"]
    assert stored.bytes == 4 * (20 * E + E * V + 20 * V)


def gpt2():
    config = GPT2Config(n_embd=256, n_head=4, n_layer=3, vocab_size=4096)
    return FastGPT2LMHeadModel(config).to(torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_weights_of_fewer_bits_count_as_they_lie(gpu, weights, rows):
    model, size = gpt2(), BucketSize(rows, 1, 64, 0)
    vocabulary = FusedOps if rows == 1 else WideOps
    (found, ops, _), (whole, _, _) = (
        recorded(model, vocabulary, size, weights=kind) for kind in (weights, "full")
    )
    own = dict(model.named_parameters(remove_duplicate=False))
    names = {name for name in ops.made if parse(name)}
    read = sum(ops.made[name].nbytes for name in names)
    replaced = sum(own[name].nbytes for name in {parse(name)[0] for name in names})
    assert len(names) == 2 * (4 * 3 + 1)
    total, before = (sum(kind.bytes for kind in kinds_.values()) for kinds_ in (found, whole))
    # Of many rows cuBLAS reads what was written as numbers, as many bytes as the weights had
    assert total - before == read + (replaced if rows > 1 else -replaced)


def bart():
    both = {"layers": 3, "attention_heads": 4, "ffn_dim": 1024}
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in both.items()}
    config = BartConfig(d_model=256, vocab_size=4096, **sides)
    return FastBartForConditionalGeneration(config).to(torch.bfloat16)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize(("make", "kind"), [(gpt2, "causal"), (bart, "seq2seq")])
def test_a_step_moves_the_floor_and_its_activations(gpu, make, kind, beams):
    model, source = make(), 40 if kind == "seq2seq" else 0
    workload = Workload(prompt_tokens=40, new_tokens=21, beams=beams)
    before = beams * (1 + 10) if source else 40 + beams * 10  # amid the call, its own token too
    size = BucketSize(1, beams, 64 * beams, source)
    found, ops, _ = recorded(model, FusedOps, size, before - beams)
    moved = sum(kind.bytes for kind in found.values())
    floor = floor_of(model, workload, kind).bytes
    assert floor < moved
    # Of a launch, rows of at most 4 * 256 elements and half as many in float32, and little more
    assert moved - floor < len(ops.launches) * beams * 4 * 256 * 6
