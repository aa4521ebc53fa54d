"""What follows a decoder step: the fused kernels against the torch code, bit for bit.

Twins, equal states over equal buckets, make the same choice by a kernel and by torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MaxLengthCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria

from fastgen import EngineOptions
from fastgen.execution.bucket import Bucket, BucketSize
from fastgen.generation.advance import Advance
from fastgen.generation.call import Call
from fastgen.generation.choose import Choose
from fastgen.generation.kernels import Selection, selects_as_torch, top_places
from fastgen.generation.state import BeamState, SampleState
from fastgen.graphs.shape import Shape
from fastgen.hf.cache import StaticKVCache
from fastgen.target import onnxruntime_cuda

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NEVER = -1.0e9


def make_bucket(batch: int, beams: int, tokens: int, vocabulary: int, dtype: torch.dtype) -> Bucket:
    target = onnxruntime_cuda(str(dtype).removeprefix("torch."))
    shape = Shape(1, 1, 8, 8, vocabulary, {})
    bucket = Bucket(shape, target, DEVICE, BucketSize(batch, beams, tokens * beams, 8))
    bucket.seek(0)
    return bucket


@dataclass
class Arguments:
    """Generation arguments that the choice of tokens depends on."""

    eos: tuple[int, ...] = (1,)
    pad: int = 0
    limit: int = 40
    beams: int = 1
    early_stopping: Any = False
    length_penalty: float = 1.0

    def call(self, prompt: Tensor, fused: bool) -> Call:
        eos = torch.tensor(self.eos, device=DEVICE) if self.eos else None
        criteria: list[Any] = [MaxLengthCriteria(self.limit)]
        if self.eos:
            criteria.append(EosTokenCriteria(list(self.eos)))
            criteria[-1].eos_token_id = eos
        config = SimpleNamespace(
            do_sample=False,
            return_dict_in_generate=False,
            num_beams=self.beams,
            early_stopping=self.early_stopping,
            length_penalty=self.length_penalty,
            max_length=self.limit,
            eos_token_id=list(self.eos),
            pad_token_id=self.pad,
            _eos_token_tensor=eos,
            _pad_token_tensor=torch.tensor(self.pad, device=DEVICE),
        )
        decoder: Any = SimpleNamespace(options=EngineOptions(fused_kernels=fused), device=DEVICE)
        hidden = torch.zeros(prompt.shape[0], 1, 8, device=DEVICE)
        return Call(decoder, prompt, [], criteria, config, None, hidden, None, StaticKVCache(1))


@dataclass
class Twin:
    """One side of a comparison."""

    state: Any
    bucket: Bucket
    choose: Any

    def tensors(self) -> dict[str, Tensor]:
        """All that choosing a token changes."""
        found = {k: v for k, v in vars(self.state).items() if isinstance(v, Tensor)}
        names = ("input_ids", "query_positions", "first_slot", "slot_mask")
        return found | {n: t for n, t in self.bucket.tensors.items() if n in names}


def make_twins(arguments: Arguments, prompt: Tensor, vocabulary: int, dtype: Any) -> list[Twin]:
    """A twin by the kernel, and one by torch."""
    twins, beams = [], arguments.beams
    capacity = arguments.limit + 3
    for fused in (True, False):
        call = arguments.call(prompt, fused)
        batch = prompt.shape[0] // beams
        bucket = make_bucket(batch, beams, arguments.limit, vocabulary, dtype)
        state: Any
        if beams > 1:
            state = BeamState(batch, beams, capacity, DEVICE)
            bucket.tensors["slot_mask"].zero_()
        else:
            state = SampleState(batch, capacity, DEVICE)
        state.begin(call)
        choose = (Advance if beams > 1 else Choose)(call, state, bucket, None)
        assert (choose._tail is not None) == fused
        twins.append(Twin(state, bucket, choose))
    return twins


def assert_equal(twins: list[Twin], context: object) -> None:
    torch.cuda.synchronize()
    ours, theirs = (twin.tensors() for twin in twins)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), (name, context, tensor, theirs[name])


def few_values(generator: torch.Generator, *axes: int) -> Tensor:
    """Logits with many ties, some -inf."""
    logits = torch.randint(-3, 6, axes, generator=generator).float()
    return torch.where(logits < -2, float("-inf"), logits)


GREEDY = {
    "plain": Arguments(),
    "no end": Arguments(eos=()),
    "several ends": Arguments(eos=(1, 5, 6, 7), pad=3),
    "pad is end": Arguments(eos=(2,), pad=2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 7, 16])
@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("vocabulary", [11, 512, 9001])
def test_greedy_choices(name: str, batch: int, vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(batch)
    prompt = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)
    twins = make_twins(GREEDY[name], prompt, vocabulary, dtype)
    for step in range(8):
        logits = few_values(generator, batch, 1, vocabulary)
        if step % 4 == 1:
            logits = torch.randn(logits.shape, generator=generator)
        if step % 4 == 2:
            logits[::2] = float("-inf")
        if step % 4 == 3:
            logits[torch.rand(logits.shape, generator=generator) < 2 / vocabulary] = float("nan")
            logits[logits == 5] = -0.0
        for twin in twins:
            twin.bucket.tensors["logits"].copy_(logits)
            twin.choose()
        assert_equal(twins, step)
        best = logits.to(DEVICE, dtype)[:, -1].argmax(dim=-1)
        running = twins[0].state.unfinished & twins[1].state.unfinished
        assert torch.equal(twins[0].bucket.tensors["input_ids"][running, 0], best[running])


@pytest.mark.parametrize("vocabulary", [32_128, 250_112])
def test_greedy_finds_a_lone_maximum_anywhere(vocabulary: int) -> None:
    """Also among equal ones, where the first counts."""
    prompt = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    twins = make_twins(Arguments(eos=(), limit=64), prompt, vocabulary, torch.bfloat16)
    for place in torch.linspace(0, vocabulary - 1, 50).long().tolist():
        for twin in twins:
            logits = twin.bucket.tensors["logits"].fill_(-1.0)
            logits[:, :, place:] = 2.0
            twin.choose()
        assert int(twins[0].bucket.tensors["input_ids"]) == place
    assert_equal(twins, vocabulary)


@pytest.mark.parametrize("count", [2, 6, 12, 17, 32, 40, 100, 256])
def test_equal_items_come_in_the_order_of_torch(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for values in (1, 2, 4, 1000):
        items = torch.randint(values, (200, count), generator=generator).float()
        items[torch.rand(items.shape, generator=generator) < 0.4] = NEVER
        items[torch.rand(items.shape, generator=generator) < 0.1] = float("-inf")
        items[torch.rand(items.shape, generator=generator) < 0.1] = -0.0
        items = items.to(DEVICE)
        for k in {1, 2, 3, 4, 5, 8, 16, 32, count} & set(range(1, min(count, 32) + 1)):
            assert torch.equal(top_places(items, k, torch.float32), torch.topk(items, k)[1]), k


@pytest.mark.parametrize("batch", [1, 2, 11])
@pytest.mark.parametrize(
    ("beams", "vocabulary", "k"),
    [(2, 61, 4), (4, 5000, 8), (4, 32_128, 8), (5, 9001, 15), (16, 4097, 32)],
)
def test_selection_is_topk_with_its_order(batch: int, beams: int, vocabulary: int, k: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(k)
    float32 = torch.float32
    assert selects_as_torch(batch, beams, vocabulary, k, float32, DEVICE)
    scores = torch.randn(batch, beams, generator=generator, device=DEVICE).round()
    select = Selection(scores, vocabulary, k, float32)
    for values in (1, 2, beams * vocabulary // 8, 10**6):
        shape = (batch * beams, vocabulary)
        items = torch.randint(values, shape, generator=generator, device=DEVICE, dtype=float32)
        items /= values
        for hidden in (0.0, 0.9, 1.0):
            items[torch.rand(shape, generator=generator, device=DEVICE) < hidden] = float("-inf")
            totals = (items.view(batch, beams, -1) + scores[:, :, None]).view(batch, -1)
            expected, places = torch.topk(totals, k)
            found = select(items)
            assert torch.equal(found[0], expected) and torch.equal(found[1], places), values


def disturb(twins: list[Twin], generator: torch.Generator) -> None:
    """Put both twins into one state that a search may get into only rarely."""
    state = twins[0].state
    shape = state.scores.shape
    scores = torch.randint(-4, 0, shape, generator=generator).float()
    finished = torch.rand(shape, generator=generator) < 0.7
    scores = torch.where(finished, scores, NEVER)
    improvable = torch.rand(shape[0], 1, generator=generator) < 0.7
    for twin in twins:
        twin.state.scores.copy_(scores)
        twin.state.finished.copy_(finished)
        twin.state.improvable.copy_(improvable)


BEAMS = {
    "two": Arguments(beams=2),
    "four": Arguments(beams=4, length_penalty=2.0),
    "early": Arguments(beams=4, early_stopping=True, eos=(1, 2, 3)),
    "never early": Arguments(beams=3, early_stopping="never", length_penalty=0.7),
    "never early, short": Arguments(beams=5, early_stopping="never", length_penalty=-1.0),
    "no end": Arguments(beams=3, eos=()),
    "pad is end": Arguments(beams=8, eos=(2,), pad=2, length_penalty=0.0),
    "sixteen": Arguments(beams=16, eos=(1, 5)),
    "long": Arguments(beams=4, limit=300),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("name", BEAMS)
def test_beam_bookkeeping(name: str, batch: int, dtype: torch.dtype) -> None:
    arguments, vocabulary = BEAMS[name], 61
    generator = torch.Generator().manual_seed(batch)
    for disturbed in (False, True):
        prompt = torch.randint(3, 60, (batch, 2), generator=generator).to(DEVICE)
        prompt = prompt.repeat_interleave(arguments.beams, dim=0)
        twins = make_twins(arguments, prompt, vocabulary, dtype)
        last = arguments.limit - 2
        for step in range(last):
            if last > 60 and 20 < step < last - 20:  # elsewhere the same happens
                for twin in twins:
                    twin.state.index.add_(1)
                    twin.state.new.add_(1)
                    twin.bucket.advance()
                continue
            logits = few_values(generator, batch, arguments.beams, vocabulary)
            if step % 2:
                logits = torch.randn(logits.shape, generator=generator)
            if disturbed and step % 3 == 2:
                disturb(twins, generator)
            for twin in twins:
                twin.bucket.tensors["logits"].copy_(logits)
                twin.choose()
            assert_equal(twins, (disturbed, step))
        assert bool(twins[0].state.seen.all())
