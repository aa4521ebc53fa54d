"""The generation modes of the parity table: one line each, a call of `generate` as a user makes it.

A mode makes the keyword arguments of `generate` for a model (stock or Fast) of a variant. What
holds state (a streamer, a KV cache, an assistant) is made anew for each call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from fastgen.hf.contract import CACHE
from tests.configs import DECODERS, VARIANTS, build_pair, fast_class, prompts

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Mode:
    """A way to call `generate`.

    `arguments` makes the keyword arguments for a model of the variant with that name. `variants`
    are the ones the mode is tried on, and `decoders` those without an encoder: all of them where
    all variants are, else the first. `path` is what `explain` must answer, None: any path.
    """

    arguments: Callable[[PreTrainedModel, str], Arguments]
    variants: tuple[str, ...] = tuple(VARIANTS)
    path: str | None = None
    decoders: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The variants of every kind."""
        everywhere = self.variants == tuple(VARIANTS)
        of_few = tuple(DECODERS) if everywhere else tuple(DECODERS)[:1]
        return self.variants + (of_few if self.decoders is None else self.decoders)


class Recorder(BaseStreamer):
    """A streamer that keeps what it was given."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(-1).clone())

    def end(self) -> None:
        self.pieces.append(torch.tensor([-1]))


class FavourMultiplesOfSeven(LogitsProcessor):
    """A user's own logits processor."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, ::7] += 1.5
        return scores


class StopAtPair(StoppingCriteria):
    """A user's own stopping criterion: a row ends once its last two tokens sum up to over 120."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return input_ids[:, -2:].sum(-1) > 120


def generate(model: PreTrainedModel, name: str, arguments: Arguments) -> Any:
    """`model.generate` after seeding, as a dictionary-like output.

    Stock transformers sizes the KV cache by the encoder's layers: a deeper decoder fails ("list
    index out of range"), a shallower one does when candidates are rejected (in 5.17). There the
    stock model is handed a KV cache that grows.
    """
    uneven = getattr(model.config, "num_decoder_layers", None) != getattr(
        model.config, "num_layers", None
    )
    if uneven and not isinstance(model, fast_class(name)) and arguments.get("use_cache", True):
        grows = EncoderDecoderCache(DynamicCache(), DynamicCache())
        arguments = {CACHE: grows} | arguments
    torch.manual_seed(0)
    return model.generate(**arguments, return_dict_in_generate=True)


def plain(
    rows: int = 3, length: int = 9, **arguments: Any
) -> Callable[[PreTrainedModel, str], Arguments]:
    """Prompts of one length with these arguments; 10 new tokens unless said."""
    if not {"max_length", "max_new_tokens", "generation_config"} & arguments.keys():
        arguments["max_new_tokens"] = 10
    return lambda model, name: {"input_ids": prompts(name, rows, length)} | arguments


def ragged(side: str, **arguments: Any) -> Callable[[PreTrainedModel, str], Arguments]:
    """Prompts of 9, 5 and 1 tokens padded on the `side` ("left" or "right")."""
    keep = torch.arange(9) < torch.tensor([[9], [5], [1]])
    keep = keep if side == "right" else keep.flip(-1)

    def make(model: PreTrainedModel, name: str) -> Arguments:
        ids = prompts(name, 3) * keep  # the pad id is 0
        masks = {"input_ids": ids, "attention_mask": keep.long()}
        return masks | {"max_new_tokens": 10} | arguments

    return make


def streamed(model: PreTrainedModel, name: str) -> Arguments:
    """Streamers take batches of one."""
    return plain(rows=1, streamer=Recorder())(model, name)


def bounded(model: PreTrainedModel, name: str) -> Arguments:
    """Lengths, which without an encoder count the prompt."""
    prompt = 9 if name in DECODERS else 0
    return plain(min_length=prompt + 7, max_length=prompt + 9)(model, name)


def own_objects(model: PreTrainedModel, name: str) -> Arguments:
    """Python objects of the user among the logits processors and the stopping criteria."""
    return plain(
        logits_processor=LogitsProcessorList([FavourMultiplesOfSeven()]),
        stopping_criteria=StoppingCriteriaList([StopAtPair()]),
    )(model, name)


def encoded(model: PreTrainedModel, name: str) -> Arguments:
    """The encoder run by hand and its output passed in."""
    call = ragged("right")(model, name)
    ids, mask = call.pop("input_ids"), call["attention_mask"]
    with torch.no_grad():
        return call | {"encoder_outputs": model.get_encoder()(input_ids=ids, attention_mask=mask)}


def embedded(model: PreTrainedModel, name: str) -> Arguments:
    """The encoder's input as embeddings."""
    call = plain()(model, name)
    return call | {"inputs_embeds": model.get_input_embeddings()(call.pop("input_ids"))}


def prompted(mask: bool = False, **arguments: Any) -> Callable[[PreTrainedModel, str], Arguments]:
    """A decoder prompt of four tokens; with `mask` its rows are padded on the left."""

    def make(model: PreTrainedModel, name: str) -> Arguments:
        prompt = prompts(name, 3, 4, seed=2)
        prompt[:, 0] = model.config.decoder_start_token_id
        call = plain(decoder_input_ids=prompt, **arguments)(model, name)
        if mask:
            keep = torch.arange(4) >= torch.tensor([[0], [1], [2]])
            call["decoder_attention_mask"] = keep.long()
        return call

    return make


def continued(mask: bool, **arguments: Any) -> Callable[[PreTrainedModel, str], Arguments]:
    """Four tokens, then on from the KV cache that the first call returned.

    Without the decoder's mask transformers takes all the tokens as new; the odd result is kept.
    """

    def make(model: PreTrainedModel, name: str) -> Arguments:
        call = plain(min_new_tokens=4, max_new_tokens=4, **arguments)(model, name)
        first = generate(model, name, call)
        call = plain(max_new_tokens=7, **arguments)(model, name)
        side = "" if name in DECODERS else "decoder_"
        call |= {f"{side}input_ids": first.sequences, CACHE: first[CACHE]}
        seen = torch.ones_like(first.sequences)
        return call | ({f"{side}attention_mask": seen} if mask else {})

    return make


def assisted(
    same_kind: bool = True, **arguments: Any
) -> Callable[[PreTrainedModel, str], Arguments]:
    """Assisted decoding; the assistant is of the model's kind (stock or Fast), or always stock."""

    def make(model: PreTrainedModel, name: str) -> Arguments:
        pair = build_pair("gpt2-scales" if name in DECODERS else "t5-buckets")
        fast = same_kind and isinstance(model, fast_class(name))
        assistant = pair.fast if fast else pair.stock
        return plain(rows=1, assistant_model=assistant, **arguments)(model, name)

    return make


def only_small_tokens(row: int, ids: torch.Tensor) -> list[int]:
    """A prefix function: eos, or the 20 tokens above the last one's half."""
    start = 3 + int(ids[-1]) // 2
    return [1, *range(start, start + 20)]


FEW = ("t5-1.0", "t5-1.1", "umt5")

MODES: dict[str, Mode] = {
    # On every variant.
    "greedy": Mode(plain()),
    "greedy one row": Mode(plain(rows=1)),
    "min and max length": Mode(bounded),
    "min new tokens": Mode(plain(min_new_tokens=8, max_new_tokens=12)),
    "sample": Mode(plain(do_sample=True)),
    "sample top-k top-p": Mode(plain(do_sample=True, top_k=20, top_p=0.8, temperature=1.3)),
    "beams": Mode(plain(num_beams=4)),
    "beam sample": Mode(plain(num_beams=3, do_sample=True, top_k=30)),
    "prompt lookup": Mode(plain(rows=1, prompt_lookup_num_tokens=3)),
    "ragged right": Mode(ragged("right")),
    "ragged left": Mode(ragged("left")),
    "ragged beams": Mode(ragged("right", num_beams=3)),
    "ragged left beams": Mode(ragged("left", num_beams=3)),
    "no repeat n-gram": Mode(plain(no_repeat_ngram_size=2)),
    "repetition penalty": Mode(plain(repetition_penalty=1.8)),
    "forced bos and eos": Mode(plain(forced_bos_token_id=7, forced_eos_token_id=1)),
    "scores": Mode(plain(output_scores=True, output_logits=True, top_k=10, do_sample=True)),
    "beam scores": Mode(plain(num_beams=3, output_scores=True, output_logits=True)),
    "streamer": Mode(streamed),
    "continued": Mode(continued(mask=True)),
    "several eos": Mode(plain(eos_token_id=[1, *range(40, 50)])),
    "encoder outputs": Mode(encoded, decoders=()),
    "decoder prompt": Mode(prompted(), decoders=()),
    "no KV cache": Mode(plain(use_cache=False)),
    # On a few.
    "sample other cut-offs": Mode(
        plain(do_sample=True, min_p=0.02, epsilon_cutoff=0.01, eta_cutoff=0.02), FEW
    ),
    "sample typical": Mode(plain(do_sample=True, typical_p=0.7), FEW),
    "sample several": Mode(plain(do_sample=True, num_return_sequences=3), FEW),
    "sample streamed": Mode(
        lambda model, name: streamed(model, name) | {"do_sample": True, "top_p": 0.9}, FEW
    ),
    "sample ragged": Mode(ragged("left", do_sample=True, num_return_sequences=2), FEW),
    "beams several": Mode(
        plain(num_beams=4, num_return_sequences=3, length_penalty=2.0, early_stopping=True), FEW
    ),
    "beams never early": Mode(plain(num_beams=3, early_stopping="never", length_penalty=-1.0), FEW),
    "beams bounded": Mode(
        plain(num_beams=3, min_length=6, no_repeat_ngram_size=2, repetition_penalty=1.3), FEW
    ),
    "beams prompted": Mode(prompted(num_beams=3), FEW, decoders=()),
    "beams behind one token": Mode(plain(length=1, num_beams=3), FEW),
    "beams behind as many tokens": Mode(plain(length=4, num_beams=3), FEW),
    "beams several eos": Mode(plain(num_beams=3, eos_token_id=[1, *range(40, 60)]), FEW),
    "beams constrained": Mode(
        plain(num_beams=3, prefix_allowed_tokens_fn=only_small_tokens, renormalize_logits=True), FEW
    ),
    "beam sample scores": Mode(
        plain(num_beams=3, do_sample=True, output_scores=True, num_return_sequences=2), FEW
    ),
    "prompt lookup sample": Mode(plain(rows=1, prompt_lookup_num_tokens=3, do_sample=True), FEW),
    "encoder penalties": Mode(
        plain(encoder_repetition_penalty=1.5, encoder_no_repeat_ngram_size=2), FEW
    ),
    "token biases": Mode(
        plain(
            sequence_bias={(5,): 3.0, (4, 5): -2.0},
            bad_words_ids=[[50], [14, 14]],
            suppress_tokens=[8, 9],
            begin_suppress_tokens=[6, 45],
        ),
        FEW,
    ),
    "length decay": Mode(plain(exponential_decay_length_penalty=(3, 1.5)), FEW),
    "own objects": Mode(own_objects, FEW),
    "generation config": Mode(
        plain(
            generation_config=GenerationConfig(
                max_new_tokens=8,
                num_beams=2,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=3,
            )
        ),
        FEW,
    ),
    "one new token": Mode(plain(max_new_tokens=1), FEW),
    "longer than a bucket": Mode(plain(rows=2, min_new_tokens=70, max_new_tokens=72), FEW[1:]),
    "beams longer than a bucket": Mode(
        plain(rows=2, num_beams=2, min_new_tokens=66, max_new_tokens=68), FEW[1:]
    ),
    "decoder prompt masked": Mode(prompted(mask=True), FEW, decoders=()),
    "decoder prompt in chunks": Mode(continued(mask=True, prefill_chunk_size=1), FEW),
    "continued without mask": Mode(continued(mask=False), FEW),
    "continued by sampling": Mode(continued(mask=True, do_sample=True), FEW),
    "input embeddings": Mode(embedded, FEW),
    "attentions": Mode(plain(output_attentions=True, output_hidden_states=True), FEW, "torch"),
    "hidden states": Mode(
        ragged("right", output_hidden_states=True), (*FEW, "byt5"), path="HF loop"
    ),
    "hidden states beams": Mode(plain(num_beams=3, output_hidden_states=True), FEW, "HF loop"),
    "hidden states assisted": Mode(
        plain(rows=1, prompt_lookup_num_tokens=3, output_hidden_states=True), FEW, "HF loop"
    ),
    "static KV cache": Mode(plain(cache_implementation="static"), FEW),
    "assisted": Mode(assisted(), FEW),
    "assisted by stock": Mode(assisted(same_kind=False), FEW),
    "assisted sample": Mode(assisted(do_sample=True), FEW),
}
