"""Programs that drive the decoder themselves, or hand it more than ``generate`` does."""

import inspect
from typing import Any

import pytest
import torch

from tests.configs import build_pair, prompts
from tests.helpers import CAUSAL, copies

PROMPT = prompts("t5-1.1")


def cache_name(model: Any) -> str:
    """What this transformers calls the argument of ``forward`` that holds keys and values."""
    stock = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers"))
    names = inspect.signature(inspect.unwrap(stock.forward)).parameters
    return "cache" if "cache" in names else "past_key_values"


@torch.no_grad()
def loop(model: Any, steps: int = 8, **more: Any) -> list[list[int]]:
    """Greedy decoding as a program may write it: tokens [B, steps + 1]."""
    name = cache_name(model)
    states, past = model.encoder(PROMPT), None
    tokens = torch.zeros(len(PROMPT), 1, dtype=torch.int64)
    for _ in range(steps):
        given = tokens if past is None else tokens[:, -1:]
        call = {"encoder_outputs": states, "decoder_input_ids": given, name: past}
        output = model(**call, use_cache=True, **more)
        past = output[name]
        tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], 1)
    return tokens.tolist()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_loop_over_forward(name: str) -> None:
    pair = build_pair(name)
    assert loop(pair.fast) == loop(pair.stock)
    with torch.no_grad():
        states = pair.fast.encoder(PROMPT)
        first = pair.fast(encoder_outputs=states, decoder_input_ids=PROMPT[:, :1], use_cache=True)
        past = {cache_name(pair.fast): first[cache_name(pair.fast)]}
        call = {"encoder_outputs": states, "decoder_input_ids": PROMPT[:, :1], **past}
        assert pair.fast.refusal(**call) is None, "the engine serves the further tokens"


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_decoder_mask_of_ones(name: str, beams: int) -> None:
    pair = build_pair(name)
    call: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 8}
    call |= {"decoder_input_ids": PROMPT[:, :3].clone(), "attention_mask": torch.ones_like(PROMPT)}
    call["decoder_attention_mask"] = torch.ones(len(PROMPT), 3, dtype=torch.int64)
    found, expected = (m.generate(PROMPT, **call).tolist() for m in (pair.fast, pair.stock))
    assert found == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_a_subclass_that_prepares_its_own_inputs(beams: int) -> None:
    """What it hands on, an argument of its own included, reaches its own forward."""
    pair, seen = copies(), []

    for model in (pair.stock, pair.fast):

        class Mine(type(model)):  # type: ignore[misc]
            def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
                inputs = super().prepare_inputs_for_generation(*args, **kwargs)
                return inputs | {"lift": 5}

            def forward(self, *args: Any, lift: int | None = None, **kwargs: Any) -> Any:
                output = super().forward(*args, **kwargs)
                seen.append(lift)
                if lift is not None:
                    output.logits[..., lift] += 0.5
                return output

        model.__class__ = Mine
    call: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 6}
    found, expected = (m.generate(PROMPT, **call).tolist() for m in (pair.fast, pair.stock))
    assert found == expected
    assert set(seen) == {5}


@pytest.mark.parametrize("more", [3, 6])
def test_continuing_from_the_returned_cache(more: int) -> None:
    pair, found = build_pair("t5-1.1"), []
    for model in (pair.stock, pair.fast):
        call: dict[str, Any] = {"return_dict_in_generate": True, "max_new_tokens": 5}
        call |= {"min_new_tokens": 5, "use_cache": True}
        first = model.generate(PROMPT, **call)
        name = next(key for key in ("cache", "past_key_values") if key in first)
        call |= {"max_new_tokens": more, "min_new_tokens": more, name: first[name]}
        later = model.generate(PROMPT, **call, decoder_input_ids=first.sequences)
        found.append(later.sequences.tolist())
    assert found[0] == found[1]
