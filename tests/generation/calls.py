"""Random `generate` calls: a strategy over the arguments, and what one call did on one model.

A call holds plain data only. What keeps state (streamers, processors, stopping criteria) is made
anew from names each time the call is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import (
    ByT5Tokenizer,
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation.stopping_criteria import EosTokenCriteria

from fastgen.hf.contract import CACHE
from tests.configs import prompts
from tests.helpers import CAUSAL
from tests.modes import Recorder, only_small_tokens

VARIANTS = ("t5-1.0", "t5-1.1", "umt5", "byt5")
Log = list[Any]


@dataclass(frozen=True)
class GenerateCall:
    """One `generate` call as plain data, printable as a counterexample."""

    variant: str
    seed: int
    rows: int
    padding: str | None
    """Side on which the prompts are padded, None: prompts of one length without a mask."""
    prompt: int
    """Decoder prompt tokens; 1 leaves the prompt to `generate`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    objects: tuple[str, ...] = ()
    """Names in OBJECTS: Python objects of the user."""
    continues: bool = False
    """Whether a second call goes on from the KV cache that the first returned."""

    @property
    def beams(self) -> int:
        return self.arguments.get("num_beams", 1)


class InPlace(LogitsProcessor):
    """A user's processor that changes the scores it is given, and notes what it was given."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.log.append(input_ids.tolist())
        scores[:, ::7] += 1.5
        return scores


class Watcher(StoppingCriteria):
    """A user's criterion: a row ends at a token divisible by 11; notes what it was given."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.log.append((input_ids.tolist(), None if scores is None else len(scores)))
        return input_ids[:, -1] % 11 == 0


class StopTogether(StoppingCriteria):
    """A user's criterion that answers for all rows at once, with one bool."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (input_ids[:, -1] > 80).any().expand(len(input_ids))


class Prefixes:
    """A user's prefix function: half of the tokens in each row; notes what it was given."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __call__(self, row: int, ids: torch.Tensor) -> list[int]:
        self.log.append((row, ids.tolist()))
        return [1, *range(row % 2, 96, 2)]


OBJECTS: dict[str, tuple[str, Callable[[Log], Any]]] = {
    "in place": ("logits_processor", InPlace),
    "own temperature": ("logits_processor", lambda _: TemperatureLogitsWarper(1.7)),
    "watcher": ("stopping_criteria", Watcher),
    "stop together": ("stopping_criteria", lambda _: StopTogether()),
    "own max length": ("stopping_criteria", lambda _: MaxLengthCriteria(6)),
    "shorter max length": ("stopping_criteria", lambda _: MaxLengthCriteria(4)),
    "own eos": ("stopping_criteria", lambda _: EosTokenCriteria(torch.tensor([40, 41, 1]))),
    "streamer": ("streamer", lambda _: Recorder()),
    "small tokens": ("prefix_allowed_tokens_fn", lambda _: only_small_tokens),
    "half of them": ("prefix_allowed_tokens_fn", Prefixes),
    "tokenizer": ("tokenizer", lambda _: ByT5Tokenizer()),
}
_LISTS = {"logits_processor": LogitsProcessorList, "stopping_criteria": StoppingCriteriaList}


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    """Any of the values alike, where ranges would favour their ends."""
    return st.sampled_from(values)


_token = one_of(*range(2, 96))
_tokens = st.lists(_token, min_size=1, max_size=4, unique=True)
_word = st.lists(_token, min_size=1, max_size=2)

ANY_MODE: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": one_of(0.6, 1.2, 1.8),
    "encoder_repetition_penalty": one_of(0.5, 1.5),
    "no_repeat_ngram_size": one_of(*range(1, 4)),
    "encoder_no_repeat_ngram_size": one_of(*range(1, 4)),
    "bad_words_ids": st.lists(_word, min_size=1, max_size=3),
    "min_length": one_of(*range(1, 13)),
    "min_new_tokens": one_of(*range(1, 10)),
    "forced_bos_token_id": _token,
    "forced_eos_token_id": one_of(1, 5),
    "suppress_tokens": _tokens,
    "begin_suppress_tokens": _tokens,
    "sequence_bias": st.dictionaries(
        st.tuples(_token) | st.tuples(_token, _token),
        one_of(-4.0, -1.5, 2.0, 5.0),
        min_size=1,
        max_size=3,
    ),
    "exponential_decay_length_penalty": st.tuples(one_of(*range(0, 7)), one_of(0.8, 1.1, 1.6)),
    "renormalize_logits": st.just(True),
    "remove_invalid_values": st.just(True),
    "eos_token_id": one_of(1, 7, [1, 7], [1, *range(40, 50)], [*range(30, 60)]),
    "pad_token_id": one_of(0, 5),
    "max_time": st.just(3600.0),
    "output_scores": st.just(True),
    "output_logits": st.just(True),
    "attention_mask_dtype": st.just("bool"),
    "watermarking_config": st.builds(WatermarkingConfig, greenlist_ratio=one_of(0.25, 0.6)),
}
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": one_of(0.3, 0.8, 1.4, 2.5),
    "top_k": one_of(0, 2, 10, 40, 200),
    "top_p": one_of(0.1, 0.6, 0.9, 0.99),
    "min_p": one_of(0.01, 0.05, 0.3),
    "typical_p": one_of(0.2, 0.7, 0.95),
    "epsilon_cutoff": one_of(0.001, 0.01, 0.05),
    "eta_cutoff": one_of(0.001, 0.01, 0.05),
    "top_h": one_of(0.3, 0.7),
}
BEAMS: dict[str, st.SearchStrategy[Any]] = {
    "length_penalty": one_of(-1.5, 0.0, 0.5, 2.0),
    "early_stopping": one_of(True, "never"),
}


#: What leaves every token to the device alone, so that a captured graph may choose it.
ON_DEVICE = {"repetition_penalty", "min_length", "min_new_tokens", "forced_bos_token_id"}
ON_DEVICE |= {"forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"}
ON_DEVICE |= {"renormalize_logits", "remove_invalid_values", "eos_token_id", "pad_token_id"}
ON_DEVICE |= {"output_scores", "output_logits", "attention_mask_dtype", *SAMPLING, *BEAMS}
ON_DEVICE |= {"own temperature", "own max length", "shorter max length", "own eos", "streamer"}
ON_DEVICE -= {"top_h"}


def _some(draw: Any, options: dict[str, st.SearchStrategy[Any]], most: int) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(options)), max_size=most, unique=True))
    return {name: draw(options[name]) for name in names}


def _objects(draw: Any, names: list[str], beams: int) -> tuple[str, ...]:
    refused = ("tokenizer", "streamer") if beams > 1 else ("tokenizer",)
    allowed = [name for name in names if name not in refused]
    named = draw(st.lists(st.sampled_from(allowed), max_size=3, unique=True))
    by_argument = {OBJECTS[name][0]: name for name in named}  # one for each scalar argument
    kept = [n for n in named if OBJECTS[n][0] in _LISTS or by_argument[OBJECTS[n][0]] == n]
    return tuple(kept) if draw(one_of(*range(0, 3))) == 0 else ()


@st.composite
def calls(draw: Any, on_device: bool = False) -> GenerateCall:
    """Calls of all four modes, with up to ten further arguments; ``on_device``: see ON_DEVICE."""
    sampling, any_mode, owned = (
        {name: table[name] for name in table if name in ON_DEVICE or not on_device}
        for table in (SAMPLING, ANY_MODE, OBJECTS)
    )
    variant = draw(st.sampled_from(VARIANTS))
    beams = draw(one_of(1, 1, 2, 4))
    sample = draw(st.booleans())
    arguments: dict[str, Any] = {"max_new_tokens": draw(one_of(*range(1, 12)))}
    if beams > 1:
        arguments |= {"num_beams": beams, **_some(draw, BEAMS, 2)}
    if sample:
        arguments |= {"do_sample": True, **_some(draw, sampling, 3)}
    arguments |= _some(draw, any_mode, 4)
    if beams > 1 or sample:
        arguments["num_return_sequences"] = draw(one_of(*range(1, 1 + (beams if beams > 1 else 3))))
    arguments["return_dict_in_generate"] = draw(st.booleans())
    several = variant != "umt5" or "umt5" in CAUSAL
    prompt = draw(one_of(1, 1, 2, 3, 6)) if several else 1
    objects = _objects(draw, [*owned], beams)
    if beams > 1 and prompt + arguments["max_new_tokens"] < 6:
        # transformers' beam search fails where a criterion allows more than max_length
        objects = tuple(name for name in objects if "max length" not in name)
    if variant == "byt5" and not on_device and draw(one_of(*range(0, 4))) == 0:
        stops = st.lists(one_of("a", "E", "zz", "7", "the"), min_size=1, unique=True)
        arguments["stop_strings"] = draw(stops)
        objects += ("tokenizer",)
    return GenerateCall(
        variant=variant,
        seed=draw(one_of(*range(0, 1001))),
        rows=draw(one_of(*range(1, 4))),
        padding=draw(one_of(None, "left", "right")),
        prompt=prompt,
        arguments=arguments,
        objects=objects,
        continues=beams == 1 and arguments["return_dict_in_generate"] and draw(st.booleans()),
    )


def inputs(call: GenerateCall) -> dict[str, Any]:
    """Prompts of the encoder and, if the call has them, of the decoder."""
    ids = prompts(call.variant, call.rows, 9, seed=call.seed)
    found: dict[str, Any] = {"input_ids": ids}
    if call.padding is not None:
        lengths = torch.tensor([[9], [5], [1]])[: call.rows]
        keep = torch.arange(9) < lengths
        keep = keep if call.padding == "right" else keep.flip(-1)
        wanted = torch.bool if "attention_mask_dtype" in call.arguments else torch.int64
        found = {"input_ids": ids * keep, "attention_mask": keep.to(wanted)}
    if call.prompt > 1:
        prompt = prompts(call.variant, call.rows, call.prompt, seed=call.seed + 1)
        prompt[:, 0] = 0  # the start token of every variant of calls()
        found["decoder_input_ids"] = prompt
    return found


def keywords(call: GenerateCall, log: Log) -> dict[str, Any]:
    """The keyword arguments of `generate`; Python objects are new, and write to the log."""
    found = inputs(call) | call.arguments
    found.pop("attention_mask_dtype", None)
    for name in call.objects:
        argument, make = OBJECTS[name]
        if argument in _LISTS:
            found.setdefault(argument, _LISTS[argument]()).append(make(log))
        else:
            found[argument] = make(log)
    return found


def outcome(model: Any, call: GenerateCall, grows: bool = False) -> dict[str, Any]:
    """All that is to be seen of a call: outputs, what objects were given, the generator after.

    Args:
        grows: hand the model a KV cache that grows (stock transformers sizes its own by the
            encoder's layers, which is wrong where the decoder has another number of them).
    """
    log: Log = []
    arguments = {name: _moved(value, model) for name, value in keywords(call, log).items()}
    if grows:
        arguments[CACHE] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    torch.manual_seed(call.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            output = model.generate(**arguments)
        except (RuntimeError, ValueError, IndexError) as error:
            return {"error": type(error).__name__}
    on_gpu = model.device.type == "cuda"
    state = torch.cuda.get_rng_state(model.device) if on_gpu else torch.get_rng_state()
    found = {"type": type(output).__name__, **_contents(output)}
    if call.continues:
        found["continued"] = _continue(model, call, output)
    pieces = arguments["streamer"].pieces if "streamer" in arguments else None
    return found | {"log": log, "streamed": pieces, "generator": state}


def _moved(value: Any, model: Any) -> Any:
    return value.to(model.device) if torch.is_tensor(value) else value


def _contents(output: Any) -> dict[str, Any]:
    if torch.is_tensor(output):
        return {"sequences": output}
    found = {name: value for name, value in output.items() if name != CACHE}
    past = output[CACHE]
    found["past length"] = past.get_seq_length()
    for kind in ("self_attention_cache", "cross_attention_cache"):
        layers = getattr(past, kind).layers
        # those behind the decoder's own stay empty, where the encoder has more
        pairs = [(layer.keys, layer.values) for layer in layers if layer.keys is not None]
        found[kind] = [(keys.clone(), values.clone()) for keys, values in pairs]
    return found


def _continue(model: Any, call: GenerateCall, output: Any) -> torch.Tensor:
    """Three more tokens, greedily, from the KV cache that a call returned."""
    arguments = {name: _moved(value, model) for name, value in inputs(call).items()}
    copies = len(output.sequences) // call.rows
    repeated = {name: value.repeat_interleave(copies, 0) for name, value in arguments.items()}
    repeated |= {
        "decoder_input_ids": output.sequences,
        "decoder_attention_mask": torch.ones_like(output.sequences),
        CACHE: output[CACHE],
    }
    return model.generate(**repeated, max_new_tokens=3)
