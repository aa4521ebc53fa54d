"""What the fused kernels record, without a GPU: launches hold addresses, and nothing runs."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config

import fastgen
from fastgen.bench.shapes import SHAPES, shape_config
from fastgen.bench.workload import Workload, standard_grid
from fastgen.blockwise import GROUPS, KINDS, parse
from fastgen.engines import NotFused
from fastgen.engines.fused.engine import FusedEngine
from fastgen.engines.fused.ops import FusedOps
from fastgen.engines.fused.products import TILE_ROWS
from fastgen.engines.fused.prompt import PromptOps
from fastgen.engines.fused.wide import WideOps
from fastgen.execution.bucket import Bucket, BucketSize
from fastgen.target import Target, onnxruntime_cuda

META = torch.device("meta")
TARGET = onnxruntime_cuda("bfloat16")
PUBLISHED = [
    name for name, shape in SHAPES.items() if shape.kind != "encoder" and "tiny" not in name
]


@pytest.fixture(autouse=True)
def an_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the recording asks of a GPU."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    yield


def made(stock: str, config: Any) -> Any:
    """A Fast model without memory, in bfloat16."""
    with META:
        return getattr(fastgen, f"Fast{stock}")(config).eval().to(torch.bfloat16)


def root_of(model: Any) -> Any:
    """The decoder's graph modules, whose parameters carry the model's names."""
    root = model._decoder_root()
    for name, parameter in root.named_parameters():
        parameter.name, parameter._realized = name, True
    return root


class Parameters(dict[str, torch.Tensor]):
    """A model's own, and what would be made of them in fewer bits."""

    def __missing__(self, name: str) -> torch.Tensor:
        found = parse(name)
        assert found is not None
        parameter, form, which = found
        whole = self[parameter]
        shape = form.shapes(*(whole.T if form.transposed else whole).shape)[which]
        values = torch.float8_e4m3fn if form.kind == "fp8" else torch.uint8
        scales = torch.float32 if form.kind == "fp8" else whole.dtype
        return torch.empty(shape, dtype=(values, scales)[which], device=whole.device)


def parameters(model: Any) -> Parameters:
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return Parameters({name: value.detach() for name, value in own.items()})


def of_fewer_bits(kind: Any, group: int | None = None) -> Target:
    return replace(TARGET, weights=kind, group=GROUPS[kind] if group is None else group)


def record(model: Any, size: BucketSize, target: Target = TARGET) -> FusedOps:
    """A step over a bucket."""
    root = root_of(model)
    tensors = Bucket(root.shape, target, META, size).tensors
    vocabulary = FusedOps if size.batch * size.queries <= TILE_ROWS else WideOps
    ops = vocabulary(target, parameters(model), tensors)
    results = root.decode(ops, **{n: t for n, t in tensors.items() if n != "logits"})
    ops.store(results["logits"], tensors["logits"])
    return ops


def size_of(workload: Workload, causal: bool) -> BucketSize:
    length = workload.new_tokens + (workload.prompt_tokens if causal else 1)
    slots = workload.beams * (1 << (length - 1).bit_length())
    return BucketSize(
        workload.batch, workload.beams, slots, 0 if causal else workload.prompt_tokens
    )


def two_layers(name: str) -> Any:
    """A published shape, but for its depth."""
    config = shape_config(name)
    for field in ("num_decoder_layers", "decoder_layers", "n_layer"):
        if hasattr(config, field):
            setattr(config, field, 2)
    return made(SHAPES[name].stock, config)


@pytest.mark.parametrize("workload", standard_grid(), ids=lambda workload: workload.title)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_step_of_the_benchmark_runs_fused(name: str, workload: Workload) -> None:
    """Recorded without a refusal; the layers of a family take as many launches each."""
    shape = SHAPES[name]
    ops = record(two_layers(name), size_of(workload, shape.kind == "causal"))
    each = {"causal": 5, "seq2seq": 8}[shape.kind]
    if size_of(workload, False)[:2] == (1, 1):
        assert len(ops.launches) == 2 * each + 2  # and the embedding, and the head
    assert len(ops.launches) >= 2 * each + 2


@pytest.mark.parametrize("rows", [(1, 1), (1, 4), (16, 1), (16, 4)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["t5-small", "t5-11b", "flan-t5-xxl", "gpt2-xl", "bart-large"])
def test_every_product_reads_weights_of_fewer_bits(
    name: str, kind: Any, rows: tuple[int, int]
) -> None:
    """Without a refusal, in as many products, or behind a launch each for many rows."""
    model, size = two_layers(name), BucketSize(*rows, 128, 0 if "gpt2" in name else 64)
    ops, whole = record(model, size, of_fewer_bits(kind)), record(model, size)
    for kernel in ops._kernels:
        assert "linear<" not in kernel or "linear<Ints" in kernel or "linear<Fp8" in kernel
    if isinstance(ops, WideOps):
        assert launched(ops, "dequantise") >= 2 * (4 if "gpt2" in name else 8) + 1
        assert len(ops.launches) >= len(whole.launches) + launched(ops, "dequantise")
    else:
        assert launched(ops, "linear") == launched(whole, "linear") > 0
    weights = {parse(n) for n in ops.made} - {None}
    products = {found[0] for found in weights if found}
    assert len(products) >= (2 * 4 if "gpt2" in name else 2 * 8) + 1


@pytest.mark.parametrize("name", ["t5-small", "gpt2"])
def test_weights_are_made_before_a_step_is_bound(name: str) -> None:
    """And torch's may be gone by then."""
    model, target = two_layers(name), of_fewer_bits("int8")
    root, asked = root_of(model), Asking(parameters(model))
    engine = FusedEngine(root, target, asked)
    tensors = Bucket(root.shape, target, META, BucketSize(1, 1, 64, 0 if name == "gpt2" else 1))
    engine.make_weights(tensors.tensors)
    ops = record(model, BucketSize(1, 1, 128, 0 if name == "gpt2" else 64), target)
    assert asked.names == {n for n in ops.made if parse(n)}


class Asking(Parameters):
    """Keeps the names of what was made."""

    def __init__(self, own: Parameters) -> None:
        super().__init__(own)
        self.names: set[str] = set()

    def __missing__(self, name: str) -> torch.Tensor:
        self.names.add(name)
        return super().__missing__(name)


def launched(ops: FusedOps, kernel: str) -> int:
    """How many launches of a kernel template."""
    return sum(getattr(launch, "kernel", "").startswith(kernel) for launch in ops.launches)


def test_weights_of_fewer_bits_that_are_refused() -> None:
    size = BucketSize(1, 1, 64, 0)
    with pytest.raises(NotFused, match="in groups of 32"):
        record(gpt2(), size, of_fewer_bits("int4", 32))
    with pytest.raises(NotFused, match=r"fp8 of .*, 72 inputs"):
        record(gpt2(n_embd=72, n_head=3, n_inner=96), size, of_fewer_bits("fp8"))
    with pytest.raises(NotFused, match=r"int8 of .*, 100 inputs"):
        record(gpt2(n_embd=64, n_head=2, n_inner=100), size, of_fewer_bits("int8"))
    with pytest.raises(NotFused, match="activations in float32"):
        record(gpt2().float(), size, replace(of_fewer_bits("int8"), dtype="float32"))


def gpt2(**fields: Any) -> Any:
    return made("GPT2LMHeadModel", GPT2Config(n_layer=2, **fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n_embd": 96, "n_head": 12}, "head size 8"),
        ({"n_embd": 100, "n_head": 5}, "multiples of 8"),
        ({"activation_function": "tanh"}, "activation 'tanh'"),
    ],
)
def test_refusals(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotFused, match=reason):
        record(gpt2(**fields), BucketSize(1, 1, 64, 0))


@pytest.mark.parametrize(("rows", "queries"), [(1, 32), (2, 512), (16, 256)])
def test_a_prompt_ends_with_its_last_keys_and_values(rows: int, queries: int) -> None:
    model = gpt2()
    root = root_of(model)
    tensors = Bucket(root.shape, TARGET, META, BucketSize(rows, 1, 1024, 0)).tensors
    own = {
        "input_ids": torch.zeros(rows, queries, dtype=torch.int64, device=META),
        "query_positions": torch.zeros(queries, 1, dtype=torch.int64, device=META),
    }
    ops = PromptOps(TARGET, parameters(model), tensors | own, filled=0)
    root.decode(ops, **{n: t for n, t in (tensors | own).items() if n not in ("logits", "kept")})
    recorded = len(ops.launches)
    ops.trim()
    assert len(ops.launches) == recorded - 5  # attention's product, the norm and the feed-forward
    assert "args.queries" in ops.source()


def test_float32_prompts_of_many_tokens_are_left_to_the_engine() -> None:
    tensors = {"input_ids": torch.zeros(4, 256, dtype=torch.int64, device=META)}
    with pytest.raises(NotFused, match="float32"):
        PromptOps(onnxruntime_cuda("float32"), {}, tensors, filled=0)


def attentions(name: str, size: BucketSize) -> list[Any]:
    """The launches of the first layer's own attention."""
    ops = record(two_layers(name), size)
    return [launch for launch in ops.launches if launch.kernel.startswith("attention")][:1]


@pytest.mark.parametrize(
    "beams, slots, blocks",
    [(1, 128, 1), (1, 256, 2), (1, 1024, 8), (4, 256, 1), (4, 1024, 2), (4, 4096, 4)],
)
def test_blocks_share_out_what_a_query_sees(beams: int, slots: int, blocks: int) -> None:
    """Of beams a quarter of the slots, which are not worth a cluster where they are few."""
    (launch,) = attentions("gpt2", BucketSize(1, beams, slots, 0))
    assert launch.cluster == blocks


@pytest.mark.parametrize("beams", [2, 4])
def test_few_rows_have_as_many_blocks_as_one(beams: int) -> None:
    def grids(beams: int) -> list[tuple[int, int]]:
        ops = record(two_layers("t5-large"), BucketSize(1, beams, 128 * beams, 64))
        own = [launch for launch in ops.launches if launch.kernel.startswith("linear")]
        return [launch.grid for launch in own[:-1]]  # but for the head's

    assert grids(beams) == grids(1)


@pytest.mark.parametrize("rows, early", [(1, True), (8, True), (16, False)])
def test_attention_of_few_blocks_reads_ahead(rows: int, early: bool) -> None:
    """Of many, what else is resident hides its loads, and needs the registers."""
    ops = record(two_layers("gpt2"), BucketSize(rows, 1, 128, 0))
    (body,) = {kernel for kernel in ops._kernels if "attention<" in kernel}
    assert f"true, false, {str(early).lower()}>" in body
