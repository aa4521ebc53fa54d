"""Models without an encoder: which forwards the engine serves, with stock's outputs."""

import copy
from typing import Any

import pytest
import torch

from fastgen.hf import contract
from fastgen.hf.contract import CACHE
from tests.configs import DECODERS, Pair, build_pair, prompts
from tests.helpers import CLOSE

POSITIONS = 96  # that the tiny models know


@pytest.fixture(params=DECODERS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return build_pair(request.param)


def left(rows: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """A ragged batch padded on the left, with the positions that generate gives."""
    keep = torch.arange(length) >= torch.tensor([[0], [4], [8]])[:rows]
    ids = prompts("gpt2", rows, length) * keep
    positions = (keep.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": keep.long(), "position_ids": positions}


@torch.no_grad()
def both(pair: Pair, **call: Any) -> list[Any]:
    """What both models give, the Fast one by its engine."""
    fast: Any = pair.fast
    assert fast.refusal(**call) is None
    assert fast.explain_forward(**call).path == "engine"
    return [pair.stock(**copy.deepcopy(call)), fast(**copy.deepcopy(call))]


def test_logits_hidden_states_and_loss(pair: Pair) -> None:
    ids = prompts("gpt2")
    call = {"input_ids": ids, "labels": ids, "output_hidden_states": True}
    stock, fast = both(pair, **call)
    for name in ("loss", "logits", "hidden_states"):
        torch.testing.assert_close(fast[name], stock[name], **CLOSE)
    assert type(fast) is type(stock)
    assert fast[CACHE].get_seq_length() == 9
    for mine, other in zip(fast[CACHE].layers, stock[CACHE].layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, **CLOSE)
        torch.testing.assert_close(mine.values, other.values, **CLOSE)


@pytest.mark.parametrize("last", [1, 3, 9, 20])
def test_logits_of_the_last_tokens_alone(pair: Pair, last: int) -> None:
    stock, fast = both(pair, input_ids=prompts("gpt2"), logits_to_keep=last)
    torch.testing.assert_close(fast.logits, stock.logits, **CLOSE)


def test_rows_padded_on_the_left(pair: Pair) -> None:
    call = left()
    stock, fast = both(pair, **call)
    seen = call["attention_mask"].bool()  # what padding computes, nothing reads
    torch.testing.assert_close(fast.logits[seen], stock.logits[seen], **CLOSE)
    assert fast.logits.isfinite().all()


def test_a_tuple_and_no_kv_cache(pair: Pair) -> None:
    stock, fast = both(pair, input_ids=prompts("gpt2"), return_dict=False, use_cache=False)
    assert len(stock) == len(fast) == 1
    torch.testing.assert_close(fast[0], stock[0], **CLOSE)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_further_tokens_of_a_programs_own_loop(pair: Pair, padded: bool) -> None:
    """Pieces of one and of several tokens, past the first bucket, some taken back between."""
    total, pieces = 90, (9, 1, 1, 5, 60, 1, 3)
    given = left(3, total) if padded else {"input_ids": prompts("gpt2", 3, total)}
    found: list[list[torch.Tensor]] = []
    for model in (pair.stock, pair.fast):
        past, start, logits = None, 0, []
        for piece in pieces:
            end = start + piece
            call = {name: value[:, start:end] for name, value in given.items()} | {CACHE: past}
            if padded:
                call["attention_mask"] = given["attention_mask"][:, :end]
            if model is pair.fast:
                assert model.refusal(**call) is None
            output = model(**call, use_cache=True)
            logits.append(output.logits[:1] if padded else output.logits)  # the first is whole
            past, start = output[CACHE], end
            if piece == 5:
                past.crop(12 if contract.CROP_TAKES_LENGTH else 12 - end)
                start = 12
        found.append(logits)
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def _holes() -> torch.Tensor:
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 4] = 0
    return mask


#: What torch serves, and words of the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "padding on the right": ({"attention_mask": left()["attention_mask"].flip(1)}, "pad on the"),
    "a hole": ({"attention_mask": _holes()}, "hides tokens"),
    "a row of padding": ({"attention_mask": torch.tensor([[1], [1], [0]]).expand(3, 9)}, "hides"),
    "left padding alone": ({"attention_mask": left()["attention_mask"]}, "without position_ids"),
    "other positions": ({"position_ids": torch.arange(3, 12)[None]}, "position_ids are not"),
    "positions of another mask": ({"position_ids": left()["position_ids"]}, "position_ids are not"),
    "a mask of scores": ({"attention_mask": torch.zeros(3, 1, 9, 9)}, "one per token"),
    "token types": ({"token_type_ids": torch.ones(3, 9, dtype=torch.int64)}, "token_type_ids"),
    "chosen logits": ({"logits_to_keep": torch.tensor([2, 5])}, "logits_to_keep is no"),
    "all logits but the first": ({"logits_to_keep": -2}, "logits_to_keep is no"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::fastgen.FallbackWarning")
def test_what_the_graph_does_not_know_is_torchs(case: str) -> None:
    pair = build_pair("gpt2")
    more, words = REFUSED[case]
    call = {"input_ids": prompts("gpt2", 3)} | more
    fast: Any = pair.fast
    with torch.no_grad():
        assert words in fast.refusal(**call)
        assert fast.explain_forward(**call).path == "torch"
        torch.testing.assert_close(fast(**call).logits, pair.stock(**call).logits, **CLOSE)


@torch.no_grad()
def test_a_kv_cache_goes_from_torch_to_the_engine_and_back() -> None:
    pair, ids = build_pair("gpt2"), prompts("gpt2", 3, 8)
    types = {"token_type_ids": torch.ones(3, 2, dtype=torch.int64)}
    for kinds in (({}, types, {}), (types, {}, {}, types)):
        found = []
        for model in (pair.stock, pair.fast):
            past = model._new_cache() if model is pair.fast else None
            for i, kind in enumerate(kinds):
                call = {"input_ids": ids[:, 2 * i : 2 * i + 2], **kind, CACHE: past}
                output = model(**call, use_cache=True)
                past = output[CACHE]
            found.append(output.logits)
        torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("bad", [torch.ones(3, 9), torch.full((3, 9), 96), torch.ones(9).long()])
@torch.no_grad()
def test_bad_ids_end_as_in_the_stock_model(bad: torch.Tensor) -> None:
    pair, outcomes = build_pair("gpt2"), []
    for model in (pair.stock, pair.fast):
        try:
            outcomes.append(model(input_ids=bad).logits.shape)
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_a_config_the_graph_does_not_know_is_torchs() -> None:
    fast: Any = copy.deepcopy(build_pair("gpt2").fast)
    fast.config.add_cross_attention = True
    with torch.no_grad():
        assert "add_cross_attention" in fast.refusal(input_ids=prompts("gpt2"))


@torch.no_grad()
def test_a_copy_of_a_kv_cache_goes_on_by_itself() -> None:
    pair, ids = build_pair("gpt2"), prompts("gpt2", 2, 6)
    logits = []
    for model in (pair.stock, pair.fast):
        past = model(input_ids=ids[:, :4], use_cache=True)[CACHE]
        other = copy.deepcopy(past)
        model(input_ids=ids[:, 4:5], use_cache=True, **{CACHE: past})
        other.reorder_cache(torch.tensor([1, 1]))
        output = model(input_ids=ids[:, 4:], use_cache=True, **{CACHE: other})
        assert (past.get_seq_length(), other.get_seq_length()) == (5, 6)
        past.reorder_cache(torch.tensor([1, 0]))
        further = model(input_ids=ids[:, 5:], use_cache=True, **{CACHE: past})
        logits.append([output.logits, further.logits])
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)


@torch.no_grad()
def test_positions_are_those_of_the_table_not_of_the_config() -> None:
    fast: Any = copy.deepcopy(build_pair("gpt2").fast)
    fast.config.n_positions = 2 * POSITIONS
    with pytest.raises(IndexError, match="index out of range"):
        fast(input_ids=prompts("gpt2", 1, POSITIONS + 1))


@torch.no_grad()
def test_as_many_tokens_as_the_model_knows_positions(pair: Pair) -> None:
    ids = prompts("gpt2", 1, POSITIONS + 1)
    stock, fast = both(pair, input_ids=ids[:, :POSITIONS])
    torch.testing.assert_close(fast.logits, stock.logits, **CLOSE)
    for model in (pair.stock, pair.fast):
        with pytest.raises(IndexError, match="index out of range"):
            model(input_ids=ids)
