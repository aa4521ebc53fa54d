"""All that fastgen relies on in transformers beyond its documented interface.

fastgen's classes are subclasses of transformers' own: they override private methods, do the work
of others in another way, and read attributes that no document promises. All of these are named
here, with what differs between versions. Nothing else in the package asks for a version; one that
the test-suite has not met is tried before it is trusted (``trial.py``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar

import torch
import transformers
from packaging.version import Version
from transformers import UMT5Config
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.umt5.modeling_umt5 import UMT5LayerSelfAttention

MET = ("5.17.0", "5.23.0", "5.24.0")
"""Versions that the test-suite has met; continuous integration runs it on the first and the last
of them."""

VERSION = Version(transformers.__version__)


def is_met() -> bool:
    """Whether the installed transformers is one that the test-suite has met."""
    return transformers.__version__ in MET


# What differs between versions

CACHE = "cache" if "cache" in {f.name for f in fields(Seq2SeqLMOutput)} else "past_key_values"
"""The keyword of a KV cache in ``forward`` and ``generate``, and its field in their outputs:
``cache`` since 5.24, which takes the older ``past_key_values`` with a warning until 5.40."""

CACHE_NAMES = tuple(dict.fromkeys((CACHE, "past_key_values")))
"""What a program may call it with this version."""

SORTS_DRAWN_BEAMS = Version("5.24.0.dev0") <= VERSION
"""Since 5.24 beam sampling sorts the candidates it has drawn, the most probable first."""

CROP_TAKES_LENGTH = Version("5.18.0.dev0") > VERSION
"""Before 5.18 ``crop`` of a KV cache took a positive number as the length to keep."""

_UMT5_SCALES_BY_ITS_OWN_FIELD = Version("5.24.0.dev0") <= VERSION

_F = TypeVar("_F", bound=Callable[..., Any])


def scales_umt5_logits(config: Any) -> bool:
    """Whether UMT5 scales what it hands to its head: by ``scale_decoder_outputs`` since 5.24, where
    ``tie_word_embeddings``, which said so before, is always true."""
    if _UMT5_SCALES_BY_ITS_OWN_FIELD:
        return bool(config.scale_decoder_outputs)
    return bool(config.tie_word_embeddings)


def umt5_refusal(ids: Any) -> str | None:
    """Why torch must serve UMT5's decoder for token ids [B, Q]: in the first versions its stock
    attention is not causal, and of several tokens each sees the later ones too."""
    if not isinstance(ids, torch.Tensor) or ids.shape[1:] in ((), (1,)) or _umt5_is_causal():
        return None
    return (
        f"UMT5 of transformers {VERSION} lets several tokens see later tokens: "
        "a newer transformers does not"
    )


@cache
def _umt5_is_causal() -> bool:
    with torch.device("meta"):
        attention = UMT5LayerSelfAttention(UMT5Config(is_decoder=True)).SelfAttention
    return bool(getattr(attention, "is_causal", False))


def cache_layers(config: Any) -> tuple[int, int]:
    """Layers of an encoder-decoder's decoder, and how many a KV cache has that stock's ``generate``
    makes: those of ``get_text_config(decoder=True)``, which takes ``decoder_layers`` for them but
    knows no ``num_decoder_layers``."""
    if hasattr(config, "decoder_layers"):
        return config.decoder_layers, config.decoder_layers
    return config.num_decoder_layers, config.num_hidden_layers


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among keyword arguments, by whichever name; None if there is none."""
    return next((arguments[n] for n in CACHE_NAMES if arguments.get(n) is not None), None)


def renames_cache(function: _F) -> _F:
    """Take the older name of a KV cache where transformers does, with its warning."""
    if CACHE == "past_key_values":
        return function
    from transformers.utils.deprecation import deprecate_kwarg

    renamed: _F = deprecate_kwarg("past_key_values", "5.40.0", new_name=CACHE)(function)
    return renamed


# What is relied on


@dataclass(frozen=True)
class Reliance:
    """Something of transformers that fastgen cannot do without."""

    name: str
    """Where it is: a module's or class's attribute, by its dotted path."""
    use: str
    """``overridden`` (ours takes its place), ``mirrored`` (ours does what it does), ``called``,
    ``read`` or ``subclassed``."""
    why: str


def _rows(use: str, prefix: str, **reasons: str) -> tuple[Reliance, ...]:
    return tuple(Reliance(f"{prefix}.{name}", use, why) for name, why in reasons.items())


_GENERATION = "transformers.GenerationMixin"
_CACHES = "transformers.cache_utils"

RELIANCES: tuple[Reliance, ...] = (
    *_rows(
        "overridden",
        _GENERATION,
        generate="looks at the weights once a call, takes DLPack tensors, and of calls whose like "
        "came before skips what it made of them (generation/known.py)",
        _sample="the fast loop in its place (generation/loop.py), token for token",
        _beam_search="the fast loop in its place (generation/beam_loop.py), token for token",
        _prepare_cache_for_generation="the engine's KV cache where it would make a dynamic one",
    ),
    *_rows(
        "mirrored",
        _GENERATION,
        _get_top_k_continuations="candidates of beams: number, order, draws",
        _get_running_beams_for_next_iteration="ended beams lose 1e9",
        _update_finished_beams="order of penalties, masks and top-k",
        _check_early_stop_heuristic="when a row can no longer improve",
        _beam_search_has_unfinished_sequences="when beam search ends",
        _update_model_kwargs_for_generation="what a further token begins with",
        _prepare_position_ids_for_generation="positions are counted from a row's first token: the "
        "graphs count them so, and other position_ids go to torch",
        prepare_inputs_for_generation="what a forward is given: the fast loop asks neither, so a "
        "program's own version of them takes the HF loop",
    ),
    *_rows(
        "called",
        _GENERATION,
        _prepare_generation_config="explain() asks it what a call comes down to",
    ),
    *_rows(
        "read",
        "transformers.pytorch_utils",
        Conv1D="a linear layer whose weight is [in, out]: its inputs are calibrated too",
    ),
    *_rows(
        "read",
        "transformers.generation.configuration_utils",
        GenerationMode="which decoding method a call takes",
    ),
    *_rows(
        "mirrored",
        "transformers.generation.logits_process",
        TemperatureLogitsWarper="runs as installed, in captured graphs too (generation/plan.py), "
        "and so do its siblings: known is what each depends on, scores, length or tokens",
        RepetitionPenaltyLogitsProcessor="takes tokens as a set",
        MinLengthLogitsProcessor="active until a length",
        MinNewTokensLengthLogitsProcessor="active until a length",
        ForcedBOSTokenLogitsProcessor="active at one length",
        ForcedEOSTokenLogitsProcessor="active at one length",
        SuppressTokensAtBeginLogitsProcessor="active at one length",
        PrefixConstrainedLogitsProcessor="runs a program's code",
    ),
    *_rows(
        "read",
        "transformers.generation.stopping_criteria",
        EosTokenCriteria="stops rows on the device",
        MaxLengthCriteria="bounds the loop on the host",
    ),
    *_rows(
        "called",
        "transformers.generation.utils",
        GenerateDecoderOnlyOutput="what the fast loop returns",
        GenerateBeamDecoderOnlyOutput="what the fast loop returns",
        GenerateEncoderDecoderOutput="what the fast loop returns",
        GenerateBeamEncoderDecoderOutput="what the fast loop returns",
    ),
    *_rows(
        "subclassed",
        _CACHES,
        DynamicLayer="SlotLayer: get_seq_length, crop, reset and lazy attributes are ours",
        DynamicCache="the two halves of the engine's KV cache; without an encoder, all of it",
        EncoderDecoderCache="StaticKVCache: is_updated and reorder_cache are used",
    ),
    *_rows(
        "called",
        "transformers.modeling_outputs",
        BaseModelOutput="what an encoder returns",
        BaseModelOutputWithPastAndCrossAttentions="what a decoder's stack returns",
        CausalLMOutputWithCrossAttentions="what forward of GPT-2 returns",
        CausalLMOutputWithPast="what forward without an encoder returns",
        BaseModelOutputWithPoolingAndCrossAttentions="what BertModel returns",
        Seq2SeqLMOutput="what forward returns",
    ),
    *_rows(
        "overridden",
        "transformers.PreTrainedModel",
        from_pretrained="takes engine_options=",
        save_pretrained="writes the stock class's name",
        is_custom_code="or weights would be initialised otherwise",
        _from_config="auto classes build by it",
        _keep_in_fp32_modules="parameters that stay float32 beside half precision",
    ),
    *_rows(
        "read",
        "transformers.utils.output_capturing",
        capture_outputs="its hooks only listen, so they may stay on a model",
    ),
    *_rows(
        "subclassed",
        "transformers.models",
        **{
            "t5.modeling_t5.T5Stack": "the stack that an engine takes the place of",
            "mt5.modeling_mt5.MT5Stack": "the stack that an engine takes the place of",
            "umt5.modeling_umt5.UMT5Stack": "the stack that an engine takes the place of",
            "bert.modeling_bert.BertModel": "all but its pooler is the engine's",
            "bart.modeling_bart.BartEncoder": "the stack that an engine takes the place of",
            "bart.modeling_bart.BartDecoder": "the stack that an engine takes the place of",
        },
    ),
    *_rows(
        "mirrored",
        "transformers.models.bert.modeling_bert",
        BertPooler="a dense layer of each row's first token, and tanh: a graph on a CPU",
    ),
    *_rows(
        "called",
        "transformers.models.t5.modeling_t5",
        **{"T5Attention._relative_position_bucket": "buckets of distances, for the bias tables"},
    ),
    *_rows(
        "read",
        "transformers.models.bert.modeling_bert",
        BertPooler="what the engine pools as, where it does",
    ),
    *_rows(
        "read",
        "transformers.models.bart.modeling_bart.BartLearnedPositionalEmbedding",
        __init__="position 0 is row 2 of its table",
    ),
    *_rows(
        "read",
        "transformers.models.umt5.modeling_umt5",
        UMT5LayerSelfAttention="whether its decoder is causal when given several tokens",
    ),
)
"""Beside these: ``generate`` takes the decoding method from the class, reads the parameters of
``forward`` and of ``prepare_inputs_for_generation`` by ``inspect``, and hands over
``_eos_token_tensor`` and ``_pad_token_tensor`` on the generation config; ``-1e9`` is the score of
what must not be chosen; a pad id of 0 fills unwritten places of beams with the end token."""
