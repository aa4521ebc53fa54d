"""Tomorrow's transformers: whatever it changes inside, the tokens are stock's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, T5ForConditionalGeneration
from transformers.generation import logits_process

import fastgen
from fastgen.doctor import report
from fastgen.hf import contract, trial
from tests.configs import build_pair, prompts

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sample": {"num_beams": 3, "do_sample": True},
    "assisted": {"prompt_lookup_num_tokens": 2},
}


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch, engine_cache_folder: Path) -> Iterator[Path]:
    """The installed version is one that nobody has met, and no verdict is known."""
    monkeypatch.setattr(contract, "MET", ())
    trial._verdict.cache_clear()
    yield engine_cache_folder
    trial._verdict.cache_clear()


def _shift(tokens: Any) -> Any:
    """Other tokens than today's, in whatever a decoding method returns."""
    if torch.is_tensor(tokens):
        return torch.where(tokens > 9, tokens - 1, tokens)
    tokens.sequences = _shift(tokens.sequences)
    return tokens


def altered_method(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A decoding method gives other tokens."""

    def alter(patch: pytest.MonkeyPatch) -> None:
        stock = getattr(GenerationMixin, name)

        def altered(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _shift(stock(self, *args, **kwargs))

        patch.setattr(GenerationMixin, name, altered)

    return alter


def altered_order(patch: pytest.MonkeyPatch) -> None:
    """Beams take the candidates in another order."""
    stock = GenerationMixin._get_top_k_continuations

    def altered(self: Any, *args: Any, **kwargs: Any) -> Any:
        return tuple(found.flip(1) for found in stock(self, *args, **kwargs))

    patch.setattr(GenerationMixin, "_get_top_k_continuations", altered)


def altered_keyword(patch: pytest.MonkeyPatch) -> None:
    """The keyword of a KV cache is another than the contract takes it for."""
    other = "past_key_values" if contract.CACHE == "cache" else "cache"
    patch.setattr(contract, "CACHE", other)
    patch.setattr(contract, "CACHE_NAMES", (other,))


def altered_processor(patch: pytest.MonkeyPatch) -> None:
    """A logits processor computes something else."""
    stock = logits_process.TopKLogitsWarper.__call__

    def altered(self: Any, ids: Any, scores: torch.Tensor) -> torch.Tensor:
        return stock(self, ids, scores) * 0.5

    patch.setattr(logits_process.TopKLogitsWarper, "__call__", altered)


def altered_forward(patch: pytest.MonkeyPatch) -> None:
    """The model itself computes other logits."""
    stock = T5ForConditionalGeneration.forward

    def altered(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(self, *args, **kwargs)
        output.logits = output.logits.roll(1, dims=-1)
        return output

    patch.setattr(T5ForConditionalGeneration, "forward", altered)


#: What changes, and the kinds of call that leave the path they take today.
CHANGES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]]] = {
    "nothing": (lambda patch: None, ()),
    "_sample": (altered_method("_sample"), ("greedy", "sample")),
    "_beam_search": (altered_method("_beam_search"), ("beams", "beam sample")),
    "order of candidates": (altered_order, ("beams", "beam sample")),
    "keyword of the KV cache": (altered_keyword, tuple(KINDS)),
    "processor": (altered_processor, ()),
    "forward": (altered_forward, tuple(KINDS)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_tokens_are_stocks(
    change: str, tomorrow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alter, slower = CHANGES[change]
    pair = build_pair("t5-1.1")
    fast: Any = copy.deepcopy(pair.fast)  # without engines
    alter(monkeypatch)
    for kind, arguments in KINDS.items():
        today = "HF loop" if kind == "assisted" else "fast loop"
        rows = 1 if kind == "assisted" else 3
        call = {"input_ids": prompts("t5-1.1", rows), "max_new_tokens": 9, **arguments}
        found = []
        for model in (pair.stock, fast):
            torch.manual_seed(5)
            found.append(model.generate(**call).tolist())
        assert found[0] == found[1], kind
        explanation = fast.explain(**call)
        assert (explanation.path != today) == (kind in slower), (kind, explanation)
        if kind in slower:
            assert any("newer than this fastgen has met" in r for r in explanation.reasons)


def test_a_verdict_is_kept_on_disk(tomorrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = fastgen.EngineOptions(cache_dir=tomorrow)
    assert trial.path(fastgen.FastT5, "greedy", options) == "fast loop"
    assert len(list(tomorrow.glob("*.trial"))) == 1
    trial._verdict.cache_clear()
    monkeypatch.setattr(trial, "_try", lambda fast: pytest.fail("tried again"))
    assert trial.path(fastgen.FastT5, "beams", options) == "fast loop"


def test_a_damaged_verdict_is_made_anew(tomorrow: Path) -> None:
    options = fastgen.EngineOptions(cache_dir=tomorrow)
    trial.path(fastgen.FastT5, "greedy", options)
    (file,) = tomorrow.glob("*.trial")
    file.write_bytes(b"\x00{")
    trial._verdict.cache_clear()
    assert trial.path(fastgen.FastT5, "greedy", options) == "fast loop"


@pytest.mark.parametrize("fast", [fastgen.FastT5, fastgen.FastMT5ForConditionalGeneration])
def test_a_trial_leaves_no_trace(fast: type, tomorrow: Path) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert trial._try(fast)["forward"] == "fast loop"
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_a_class_of_the_programs_own_is_judged_by_ours(tomorrow: Path) -> None:
    class Mine(fastgen.FastT5):  # type: ignore[name-defined, misc]
        pass

    assert trial.path(Mine, "greedy", fastgen.EngineOptions(cache_dir=tomorrow)) == "fast loop"


def test_doctor_names_what_takes_a_slower_path(
    tomorrow: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    altered_method("_beam_search")(monkeypatch)
    assert report()
    said = " ".join(capsys.readouterr().out.split())
    assert f"transformers {contract.VERSION}: not met" in said
    assert "FastT5ForConditionalGeneration: beams calls by HF loop, beam sample calls by" in said


def test_one_warning_says_so(tomorrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast: Any = copy.deepcopy(build_pair("t5-1.1").fast)
    altered_method("_sample")(monkeypatch)
    for expected in (1, 0):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", fastgen.FallbackWarning)
            for _ in range(2):
                fast.generate(prompts("t5-1.1", 2), max_new_tokens=3)
        found = [w for w in said if issubclass(w.category, fastgen.FallbackWarning)]
        assert len(found) == expected
        assert all("newer than this fastgen has met" in str(w.message) for w in found)
