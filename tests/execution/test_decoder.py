"""The decoder's buffers serve calls of every kind; further tokens are looked at as first ones."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgen.engines import NotFused
from fastgen.execution.bucket import BucketSize
from fastgen.execution.decoder import Decoder
from fastgen.hf.contract import CACHE
from tests.configs import build_pair, prompts
from tests.generation.emulate import gpu_paths
from tests.helpers import CLOSE, assert_equal_logits, copies, sources, targets, tokens


@torch.no_grad()
def forward(model: Any, **arguments: Any) -> Any:
    return model(**arguments)


@pytest.mark.parametrize(
    "wrong", [torch.tensor([[5]]), torch.tensor([[5], [-1], [7]]), torch.ones(3, 1)]
)
def test_wrong_ids_of_a_further_token_are_errors(wrong: torch.Tensor) -> None:
    pair = build_pair("t5-1.1")
    for model in (pair.stock, pair.fast):
        first = {"input_ids": sources()[:3], "decoder_input_ids": targets()[:3, :2]}
        output = forward(model, **first, use_cache=True)
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            forward(
                model,
                encoder_outputs=(output.encoder_last_hidden_state,),
                decoder_input_ids=wrong,
                **{CACHE: output[CACHE]},
            )


def test_a_mask_of_fractions_hides_nothing() -> None:
    pair = build_pair("t5-1.1")
    mask = torch.full(sources().shape, 0.5)
    mask[0, 4:] = 0
    call: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8}
    expected = pair.stock.generate(sources(), **call)
    assert torch.equal(pair.fast.generate(sources(), **call), expected)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_buffers_made_in_inference_mode_serve_every_mode(beams: int, on_gpu: bool) -> None:
    pair = copies("t5-1.1")
    pair.fast.invalidate_engine()
    call: dict[str, Any] = {"max_new_tokens": 5, "num_beams": beams}
    expected = pair.stock.generate(sources(), **call)
    with gpu_paths() if on_gpu else nullcontext():
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(pair.fast.generate(sources(), **call), expected)
                assert_equal_logits(pair)


# Prompts in pieces

#: Tokens that one run over a prompt may read, where three rows have nine: pieces of 2 and of 1.
PIECES = (7, 1)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each run over several tokens: tokens of a row, and of how many logits are given."""
    found: list[tuple[int, int]] = []
    prefill = Decoder._prefill

    def noted(decoder: Decoder, bucket: Any, ids: Any, length: int, last: int, states: bool) -> Any:
        found.append((ids.shape[1], last))
        return prefill(decoder, bucket, ids, length, last, states)

    monkeypatch.setattr(Decoder, "_prefill", noted)
    return found


@pytest.mark.parametrize("call", [{}, {"num_beams": 3}, {"do_sample": True}])
@pytest.mark.parametrize("name", ["t5-1.1", "gpt2"])
def test_a_prompt_is_run_in_pieces_and_without_logits(
    name: str, call: dict[str, Any], runs: list[tuple[int, int]]
) -> None:
    pair, prompt = copy.deepcopy(build_pair(name)), {"input_ids": prompts(name, 3)}
    if name != "gpt2":
        start = torch.full((3, 1), pair.stock.config.decoder_start_token_id)
        prompt["decoder_input_ids"] = torch.cat((start, tokens(3, 8, seed=5)), dim=1)
    found = []
    for tokens_a_run in (4096, *PIECES):
        pair.fast.engine_options = {"prefill_tokens": tokens_a_run}
        for model in (pair.stock, pair.fast):
            torch.manual_seed(3)
            found.append(model.generate(**prompt, **call, max_new_tokens=5).tolist())
    assert found == found[:1] * 6
    pieces = [(8, 0), *[(2, 0)] * 4, *[(1, 0)] * 8]
    assert runs == ([] if call.get("num_beams") and name != "gpt2" else pieces)


@pytest.mark.parametrize("tokens_a_run", PIECES)
@pytest.mark.parametrize(
    ("name", "asked"),
    [
        *((name, {}) for name in ("t5-1.1", "umt5", "gpt2")),
        *((name, {"output_hidden_states": True}) for name in ("t5-1.1", "umt5", "gpt2")),
        ("gpt2", {"logits_to_keep": 4}),  # others do not know it
    ],
)
@torch.no_grad()
def test_forward_runs_in_pieces(
    name: str, asked: dict[str, Any], tokens_a_run: int, runs: list[tuple[int, int]]
) -> None:
    pair, call = copy.deepcopy(build_pair(name)), {"input_ids": prompts(name, 3)} | asked
    if name != "gpt2":
        call["decoder_input_ids"] = tokens(3, 9, seed=5)
    pair.fast.engine_options = {"prefill_tokens": tokens_a_run}
    stock, fast = (model(**call) for model in (pair.stock, pair.fast))
    for key in ("logits", "hidden_states", "decoder_hidden_states"):
        torch.testing.assert_close(fast.get(key), stock.get(key), **CLOSE)
    piece = tokens_a_run // 3 or 1
    assert sum(queries for queries, _ in runs) == 9
    assert max(queries for queries, _ in runs) == piece
    assert sum(last for _, last in runs) == asked.get("logits_to_keep", 9)


@torch.no_grad()
def test_a_stack_without_its_head_runs_in_pieces(runs: list[tuple[int, int]]) -> None:
    pair = copy.deepcopy(build_pair("t5-1.1"))
    pair.fast.engine_options = {"prefill_tokens": 7}
    call = {"encoder_hidden_states": torch.randn(3, 4, pair.stock.config.d_model)}
    call |= {"input_ids": tokens(3, 9, seed=5), "output_hidden_states": True}
    stock, fast = (model.decoder(**call) for model in (pair.stock, pair.fast))
    torch.testing.assert_close(fast.last_hidden_state, stock.last_hidden_state, **CLOSE)
    torch.testing.assert_close(fast.hidden_states, stock.hidden_states, **CLOSE)
    assert [queries for queries, _ in runs] == [2, 2, 2, 2, 1]


class StandIn:
    """In place of the engine of fused kernels: another engine, for steps of few rows."""

    def __init__(self, decoder: Decoder, most: int) -> None:
        self.decoder, self.most = decoder, most

    def bind(self, tensors: Any) -> Any:
        rows, slots = tensors["input_ids"].numel(), tensors["slot_positions"].shape[1]
        if rows > self.most:
            raise NotFused(f"{rows} rows")
        return self.decoder.decoder(False, slots).bind(tensors)


def test_it_is_told_whether_the_fused_kernels_ran_the_steps() -> None:
    pair = copies("t5-1.1")
    call: dict[str, Any] = {"max_new_tokens": 4}
    assert pair.fast.ran_fused() is None  # no call yet
    pair.fast.generate(sources()[:1], **call)
    assert pair.fast.ran_fused() is None  # on a CPU there are none
    decoder: Any = pair.fast._engine
    decoder.pool.release_idle()
    decoder.fused = StandIn(decoder, most=1)
    for rows, fused in ((1, True), (3, False), (1, True)):
        expected = pair.stock.generate(sources()[:rows], **call)
        assert torch.equal(pair.fast.generate(sources()[:rows], **call), expected)
        assert pair.fast.ran_fused() is fused


def test_programs_of_long_prompts_are_few() -> None:
    """Their scratch has a row for each token; those of short ones are captured as steps are."""
    fast = copies("gpt2").fast
    forward(fast, input_ids=prompts("gpt2", 1, 4))
    decoder: Decoder = fast._engine
    ran: list[tuple[list[int], int]] = []

    def bind_prompt(given: dict[str, torch.Tensor], filled: int) -> Any:
        positions = given["query_positions"][:, 0]
        return SimpleNamespace(run=lambda: ran.append((positions.tolist(), filled)))

    decoder.fused = SimpleNamespace(bind_prompt=bind_prompt)
    bucket = decoder.pool.lease(BucketSize(2, 1, 64, 0)).bucket
    for length in (0, 5, 10, 10):
        assert decoder._runs_prompt(bucket, torch.ones(2, 5, dtype=torch.int64), length)
    assert ran == [([*range(at, at + 5)], at) for at in (0, 5, 10, 10)]
    assert [key[1] for key in bucket.prompts] == [("prompt", 5, 5), ("prompt", 5, 10)]
    assert not bucket.steps
