"""What no graph is written for: bad input and unknown arguments have the stock model's outcome."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from tests.configs import build_pair
from tests.helpers import CAUSAL, CLOSE, refusal, sources, targets

HALF = torch.full((3, 9), 0.5)


def hidden(*index: Any) -> torch.Tensor:
    """Encoder outputs [3, 9, 32], or a part of them."""
    return torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0))[index]


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64)


#: Wrong (or odd) token ids; tried as what ``generate``, the encoder and the decoder read.
IDS: dict[str, Any] = {
    "NumPy": sources().numpy(),
    "list": sources().tolist(),
    "no tokens": sources()[:, :0],
    "no rows": sources()[:0],
    "float": sources().float(),
    "bool": sources().bool(),
    "uint8": sources().to(torch.uint8),
    "1-D": sources()[0],
    "3-D": sources()[None],
    "too high": sources() + 1000,
    "negative": -sources(),
    "sparse": sources().to_sparse(),
}
MASKS: dict[str, Any] = {
    "NumPy": np.ones((3, 9)),
    "list": ones(3, 9).tolist(),
    "short": ones(3, 4),
    "long": ones(3, 12),
    "one row": ones(1, 9),
    "1-D": ones(9),
    "no tokens": ones(3, 0),
    "halves": HALF,
    "negative": -ones(3, 9),
    "bool": torch.arange(9).expand(3, 9) < 5,
    "twos": 2 * ones(3, 9),
}
HIDDEN: dict[str, Any] = {
    "width 1": hidden(..., slice(1)),
    "other width": hidden(..., slice(16)),
    "half": hidden().half(),
    "double": hidden().double(),
    "int": hidden().long(),
    "2-D": hidden(0),
    "4-D": hidden(None),
    "no tokens": hidden(slice(None), slice(0)),
    "no rows": hidden(slice(0)),
    "other rows": hidden(slice(1)),
    "NumPy": hidden().numpy(),
    "nothing": None,
}
GENERATE: dict[str, dict[str, Any]] = {
    "nothing": {"inputs": None},
    "twice": {"input_ids": sources()},
    "unknown argument": {"colour": 1},
    "max_length=-1": {"max_length": -1, "max_new_tokens": None},
    "max_new_tokens=0": {"max_new_tokens": 0},
    "max_new_tokens=-3": {"max_new_tokens": -3},
    "max_new_tokens=3.5": {"max_new_tokens": 3.5},
    "max_new_tokens='3'": {"max_new_tokens": "3"},
    "max_length=1": {"max_length": 1, "max_new_tokens": None},
    "num_beams=0": {"num_beams": 0},
    "num_beams=-1": {"num_beams": -1},
    "more sequences than beams": {"num_beams": 2, "num_return_sequences": 3},
    "top_k=0": {"do_sample": True, "top_k": 0},
    "temperature=0": {"do_sample": True, "temperature": 0.0},
    "repetition_penalty=0": {"repetition_penalty": 0.0},
    "start token": {"decoder_start_token_id": 5000},
    "start tokens": {"decoder_start_token_id": [1, 2]},
    "end token": {"eos_token_id": 5000},
    "KV cache": {"past_key_values": "none"},
    "use_cache": {"use_cache": "yes"},
    "embeddings": {"inputs": None, "inputs_embeds": hidden(..., slice(3))},
    "states": {"inputs": None, "encoder_outputs": hidden()},
}
FORWARD: dict[str, dict[str, Any]] = {
    "nothing": {"input_ids": None},
    "no decoder ids": {"decoder_input_ids": None},
    "ids and embeddings": {"inputs_embeds": hidden()},
    "decoder ids and embeddings": {"decoder_inputs_embeds": hidden()},
    "decoder rows": {"decoder_input_ids": targets()[:2]},
    "decoder mask short": {"decoder_attention_mask": ones(3, 2)},
    "decoder mask long": {"decoder_attention_mask": ones(3, 9)},
    "decoder mask of one row": {"decoder_attention_mask": ones(1, 5)},
    "decoder mask 1-D": {"decoder_attention_mask": ones(5)},
    "decoder mask list": {"decoder_attention_mask": ones(3, 5).tolist()},
    "decoder mask empty": {"decoder_attention_mask": ones(3, 0)},
    "KV cache str": {"past_key_values": "none"},
    "KV cache tuple": {"past_key_values": ((hidden(), hidden()),)},
    "states nothing": {"input_ids": None, "encoder_outputs": ()},
    "states without any": {"input_ids": None, "encoder_outputs": BaseModelOutput()},
    "states dict": {"input_ids": None, "encoder_outputs": {"last_hidden_state": hidden()}},
    "states tensor": {"input_ids": None, "encoder_outputs": hidden()},
    "unknown argument": {"colour": 1},
    "unknown mask": {"head_mask": ones(2, 4)},
    "positions": {"position_ids": ones(3, 5)},
}
LABELS: dict[str, Any] = {
    "list": targets().tolist(),
    "NumPy": targets().numpy(),
    "1-D": targets()[0],
    "3-D": targets()[None],
    "float": targets().float(),
    "int32": targets().int(),
    "too high": targets() + 1000,
    "negative": -targets(),
    "no tokens": targets()[:, :0],
    "bool": True,
}


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name, kind of call and the arguments that differ from a right call."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, ids in IDS.items():
        found[f"generate: ids {name}"] = "generate", {"inputs": ids}
        found[f"generate: decoder ids {name}"] = "generate", {"decoder_input_ids": ids}
        found[f"encoder: ids {name}"] = "encoder", {"input_ids": ids}
        found[f"forward: ids {name}"] = "forward", {"input_ids": ids}
        found[f"forward: decoder ids {name}"] = "forward", {"decoder_input_ids": ids}
    empty = {"input_ids": sources()[:0], "decoder_input_ids": targets()[:0]}
    found["forward: empty batch"] = "forward", empty
    for name, mask in MASKS.items():
        for kind in ("generate", "encoder", "forward"):
            found[f"{kind}: mask {name}"] = kind, {"attention_mask": mask}
    for name, states in HIDDEN.items():
        call = {"input_ids": None, "encoder_outputs": (states,)}
        found[f"forward: states {name}"] = "forward", call
        given = BaseModelOutput(last_hidden_state=states)
        call = {"inputs": None, "encoder_outputs": given}
        found[f"generate: states {name}"] = "generate", call
    for name, labels in LABELS.items():
        found[f"forward: labels {name}"] = "forward", {"labels": labels, "decoder_input_ids": None}
        found[f"forward: ids and labels {name}"] = "forward", {"labels": labels}
    found |= {f"generate: {name}": ("generate", call) for name, call in GENERATE.items()}
    found |= {f"forward: {name}": ("forward", call) for name, call in FORWARD.items()}
    found["encoder: use_cache"] = "encoder", {"use_cache": True}
    found["encoder: unknown argument"] = "encoder", {"colour": 1}
    found["encoder: nothing"] = "encoder", {"input_ids": None}
    found["encoder: ids and embeddings"] = "encoder", {"inputs_embeds": hidden()}
    return found


CASES = cases()


@torch.no_grad()
def outcome(model: Any, kind: str, changes: dict[str, Any]) -> Any:
    """What a call gives: an output, or the exception that it raises."""
    changes = copy.deepcopy(changes)
    torch.manual_seed(0)
    try:
        if kind == "generate":
            return model.generate(**{"inputs": sources(), "max_new_tokens": 4} | changes)
        if kind == "encoder":
            return model.encoder(**{"input_ids": sources()} | changes)
        return model(**{"input_ids": sources(), "decoder_input_ids": targets()} | changes)
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "t5-1.0"])
def test_the_outcome_is_that_of_the_stock_model(name: str, case: str) -> None:
    pair, (kind, changes) = build_pair(name), CASES[case]
    expected, found = (outcome(model, kind, changes) for model in (pair.stock, pair.fast))
    if isinstance(expected, Exception) or isinstance(found, Exception):
        assert type(found) is type(expected), f"{found!r}, where stock gives {expected!r}"
    elif isinstance(expected, torch.Tensor):
        assert found.tolist() == expected.tolist()
    else:
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found[key], value, **CLOSE, equal_nan=True)


#: Calls of ``generate`` that torch reports, and what explain() says of them.
EXPLAINED: dict[str, tuple[dict[str, Any], str]] = {
    "NumPy": ({"input_ids": sources().numpy()}, "input_ids are a ndarray"),
    "no tokens": ({"inputs": sources()[:, :0]}, "input_ids are empty"),
    "float": ({"input_ids": sources().float()}, "2-dimensional torch.float32"),
    "decoder ids": ({"decoder_input_ids": targets()[:, :0]}, "empty"),
    "mask": ({"input_ids": sources(), "attention_mask": ones(3, 4)}, "attention_mask is [3, 4]"),
    "width": ({"encoder_outputs": (hidden(..., slice(1)),)}, "not [B, S, 32]"),
    "dtype": ({"encoder_outputs": (hidden().half(),)}, "torch.float16"),
    "unknown argument": ({"colour": 1}, "the argument colour"),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_says_that_torch_reports_it(case: str) -> None:
    call, reason = EXPLAINED[case]
    explanation = build_pair("t5-1.1").fast.explain(**call)
    assert explanation.path == "torch"
    assert reason in str(explanation)


def test_an_unknown_argument_goes_to_torch() -> None:
    """It is not swallowed: whoever overrides a part of the model may read it there."""
    model: Any = build_pair("t5-1.1").fast
    assert "the argument colour" in str(refusal(model, colour=1))
    with torch.no_grad():
        assert "the argument colour" in model.encoder.refusal(input_ids=sources(), colour=False)
        assert model.encoder.refusal(input_ids=sources(), colour=None) is None
    assert refusal(model, colour=None) is None
