"""The same tokens as stock transformers: every variant of every family in every generation mode.

fp32 on the CPU. The tables are in configs.py (variants) and modes.py (generation modes).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgen.hf.contract import CACHE
from tests.configs import DECODERS, EVERY, build_pair
from tests.modes import MODES, generate, plain

PATHS = ("fast loop", "HF loop", "torch")
CASES = [(name, mode) for mode, row in MODES.items() for name in row.names]
#: Outputs of `generate` that are compared, where a mode asks for them.
OUTPUTS = ("sequences", "sequences_scores", "beam_indices", "scores", "logits")
OUTPUTS += ("encoder_hidden_states", "decoder_hidden_states", "hidden_states")


def outcome(model: Any, name: str, mode: str) -> dict[str, Any]:
    """What a mode's call returned and streamed, by name."""
    arguments = MODES[mode].arguments(model, name)
    output = generate(model, name, arguments)
    found = {key: output[key] for key in OUTPUTS if output.get(key) is not None}
    if "streamer" in arguments:
        found["streamed"] = arguments["streamer"].pieces
    return found


@pytest.mark.parametrize(("name", "mode"), CASES, ids=[f"{m}-{n}" for n, m in CASES])
def test_same_tokens(name: str, mode: str) -> None:
    pair = build_pair(name)
    expected, found = outcome(pair.stock, name, mode), outcome(pair.fast, name, mode)
    # Token ids first and exactly: a difference of values is then known to be only that. The stock
    # logits, of a spread of 10, are up to 1e-4 away from their values in float64.
    assert found["sequences"].tolist() == expected["sequences"].tolist()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("mode", MODES)
def test_explain_names_a_path(mode: str) -> None:
    name = MODES[mode].variants[0]
    model: Any = build_pair(name).fast
    arguments = MODES[mode].arguments(model, name)
    explanation = model.explain(**arguments, return_dict_in_generate=True)
    assert explanation.path in ((MODES[mode].path,) if MODES[mode].path else PATHS)
    assert explanation.path in str(explanation)


def test_the_table_is_large_enough() -> None:
    assert len(set(CASES)) >= 200


@pytest.mark.parametrize("name", EVERY)
def test_decoding_is_eventful(name: str) -> None:
    """The table proves little on models that repeat one token or never end."""
    call = plain(rows=4, max_new_tokens=14)
    stock = build_pair(name).stock
    arguments = call(stock, name)
    prompt = arguments["input_ids"].shape[1] if name in DECODERS else 1
    rows = generate(stock, name, arguments).sequences[:, prompt:].tolist()
    ends = {row.index(1) for row in rows if 1 in row}
    assert len(ends) >= 2, f"rows that end at different steps are wanted, got {rows}"
    assert sum(len(set(row)) for row in rows) >= 24, f"varied tokens are wanted, got {rows}"


@pytest.mark.parametrize("name", ["t5-1.0", "umt5"])
def test_continues_from_a_stock_kv_cache(name: str) -> None:
    pair = build_pair(name)
    results = []
    for model in (pair.stock, pair.fast):
        call = plain(min_new_tokens=4, max_new_tokens=4)(pair.stock, name)
        first = generate(pair.stock, name, call)
        call |= {
            "decoder_input_ids": first.sequences,
            "decoder_attention_mask": torch.ones_like(first.sequences),
            CACHE: first[CACHE],
            "max_new_tokens": 7,
        }
        results.append(generate(model, name, call).sequences.tolist())
    assert results[0] == results[1]
