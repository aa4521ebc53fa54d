"""Which arguments no engine serves, whatever the model, and why."""

from typing import Any

import torch

from fastgen.execution.bucket import Bucket
from fastgen.execution.decoder import Decoder
from fastgen.fallback import AUTOCAST, Asked
from fastgen.generation.explain import ANY_LOOP
from fastgen.hf import contract
from fastgen.hf.module import EngineModule
from fastgen.hf.outward import reads
from fastgen.hf.weights import asks_for_gradients

_IDS = (torch.int32, torch.int64)

# What Trainer and the HF loop hand to forward, and no stock model or encoder of ours reads
_UNREAD = {"num_items_in_batch", *ANY_LOOP}

# What an encoder, a whole model and a decoder stack are written for; any other goes to torch
ENCODER_ARGUMENTS = frozenset(
    {"input_ids", "attention_mask", "inputs_embeds", "use_cache", "return_dict", "labels"} | _UNREAD
)
MODEL_ARGUMENTS = ENCODER_ARGUMENTS | {
    *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "encoder_outputs"),
    *contract.CACHE_NAMES,
}
DECODER_ARGUMENTS = frozenset(
    {
        *("input_ids", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
        *("inputs_embeds", "use_cache", "return_dict", *contract.CACHE_NAMES),
    }
    | _UNREAD
)

CAUSAL_ARGUMENTS = frozenset(
    {
        *("input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache"),
        *("return_dict", "labels", "logits_to_keep", *contract.CACHE_NAMES),
    }
    | _UNREAD
)


def common_refusal(
    module: EngineModule, kwargs: dict[str, Any], known: frozenset[str]
) -> str | None:
    """What no engine serves, whatever the model; what takes no time to see is looked at first.

    Args:
        known: names of the arguments that the caller looks at itself.
    """
    if module.training:
        return "the model is in training mode: call model.eval()"
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "torch is tracing or compiling the model"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return AUTOCAST
    if torch.is_grad_enabled() and asks_for_gradients(module):
        return "gradients may be asked for: wrap the call in torch.no_grad()"
    asked = kwargs.pop("output_attentions", None)
    if asked or (asked is None and getattr(module.config, "output_attentions", False)):
        return Asked("output_attentions are recorded by torch only")
    if reason := _states_refusal(module, kwargs):
        return reason
    for name, value in kwargs.items():
        if value is not None and name not in known:
            return f"the argument {name} is served by torch only: leave it out if it can be"
    return module.standing_refusal()


def states_wanted(module: EngineModule, kwargs: dict[str, Any]) -> Any:
    """What a call says of ``output_hidden_states``, or else the config, as in transformers."""
    default = getattr(module.config, "output_hidden_states", False)
    return kwargs.get("output_hidden_states", default)


def _states_refusal(module: EngineModule, kwargs: dict[str, Any]) -> str | None:
    wanted, backend = states_wanted(module, kwargs), module.engine_options.backend
    kwargs.pop("output_hidden_states", None)
    if isinstance(wanted, (list, tuple, set)):
        return Asked("output_hidden_states of chosen layers are recorded by torch only")
    if wanted and "tensorrt" in backend:
        return Asked(
            f"output_hidden_states are recorded by ONNX Runtime or torch, not by {backend}"
        )
    return None


def ids_refusal(module: Any, ids: Any) -> str | None:
    """Token ids that torch reports as wrong, while the engine would read some row for them."""
    if reason := form_refusal("token ids", ids, module):
        return reason
    if ids is ... or ids.device.type != "cpu":  # on a GPU a look at them would wait for it
        return None
    low, high = ends(ids)
    vocabulary = module.get_input_embeddings().weight.shape[0]
    if low < 0 or high >= vocabulary:
        return Asked(f"token ids from {low} to {high} are not all in 0 .. {vocabulary - 1}")
    return None


def ends(numbers: torch.Tensor) -> tuple[int, int]:
    """The smallest and the largest of whole numbers on the CPU; by NumPy, as torch's threads would
    spin on where the engine's are to run next."""
    array = numbers.numpy()
    return int(array.min()), int(array.max())


def form_refusal(what: str, ids: Any, module: Any) -> str | None:
    """Token ids that are no [B, Q] of whole numbers beside the model; ``...``: explain() asks."""
    if ids is ...:
        return None
    if not isinstance(ids, torch.Tensor):
        return Asked(f"{what} are a {type(ids).__name__}, not a tensor")
    if ids.ndim != 2 or ids.dtype not in _IDS or ids.layout != torch.strided:
        return Asked(f"{what} are {ids.ndim}-dimensional {ids.dtype}, not [B, Q] of int64")
    if not ids.numel():
        return Asked(f"{what} are empty: {list(ids.shape)}")
    return _place_refusal(what, ids, module)


def hidden_refusal(what: str, source: Any, module: Any) -> str | None:
    """An encoder's hidden states that torch reports as wrong, while a graph would bend them;
    ``...``: explain() asks."""
    if source is ...:
        return None
    width = module.config.d_model
    if not isinstance(source, torch.Tensor):
        return Asked(f"{what} hold a {type(source).__name__}, not a tensor")
    if source.ndim != 3 or source.shape[2] != width or not reads(module, source):
        made = f"{list(source.shape)} of {source.dtype}"
        return Asked(f"{what} are {made}, not [B, S, {width}] of {module.dtype}")
    if not source.numel():
        return Asked(f"{what} are empty: {list(source.shape)}")
    if source.requires_grad and torch.is_grad_enabled():
        return Asked(f"gradients of {what} may be asked for")
    return _place_refusal(what, source, module)


def mask_refusal(mask: Any, shape: torch.Size) -> str | None:
    """An attention_mask that is not one value per source token of ``shape``."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        return Asked(f"attention_mask is a {type(mask).__name__}, not a tensor")
    if mask.shape == shape[:2] and mask.layout == torch.strided:
        return None
    return Asked(f"attention_mask is {list(mask.shape)}, not {list(shape[:2])}: one per token")


def empty_row_refusal(mask: torch.Tensor | None) -> str | None:
    """An attention_mask that hides all of a row; on a GPU a look at it would wait for it."""
    if mask is None or mask.device.type != "cpu" or mask.all() or mask.any(dim=1).all():
        return None
    return "attention_mask hides all of a row, which only torch serves"


def foreign_refusal(past: Any, own: type) -> str | None:
    """A KV cache that is not of the engine's kind."""
    if past is None or isinstance(past, own):
        return None
    kind = f"{contract.CACHE} is a {type(past).__name__}, not the engine's own KV cache"
    return f"{kind}: leave it (and cache_implementation) out"


def decoder_mask_refusal(mask: Any, ids: Any, past: Any) -> str | None:
    """A decoder_attention_mask that hides anything of the tokens so far: ``past`` and ``ids``."""
    if mask is None:
        return None
    if isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor):
        length = 0 if past is None else past.get_seq_length()
        wanted = (len(ids), length + ids.shape[-1])
        if mask.shape == wanted and bool(mask.all()):
            return None
        if mask.shape == wanted:
            return "decoder_attention_mask hides tokens, which only torch serves"
    return Asked("decoder_attention_mask is no tensor of one value per token so far")


def left_mask_refusal(mask: Any, shape: torch.Size | None) -> str | None:
    """An attention_mask that is not one value per token so far, with zeros on the left only."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape != shape:
        made = list(mask.shape) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        wanted = None if shape is None else list(shape)
        return Asked(f"attention_mask is {made}, not {wanted}: one per token so far")
    seen = mask != 0
    if bool(seen[:, -1].all()) and bool((seen[:, 1:] >= seen[:, :-1]).all()):
        return None
    return (
        "attention_mask hides tokens that are not the first of a row, which only torch serves: pad "
        'on the left (tokenizer.padding_side = "left")'
    )


def positions_refusal(
    positions: Any, starts: torch.Tensor | None, shape: torch.Size, length: int
) -> str | None:
    """position_ids that are not the places of the tokens behind ``length`` others, counted from
    where their rows start [B, 1] (None: at the first)."""
    if positions is None:
        if starts is None or not bool(starts.any()):
            return None
        return (
            "attention_mask without position_ids, which stock then counts from the padding on: "
            "give them, as generate does"
        )
    rows, total = shape
    form = isinstance(positions, torch.Tensor) and positions.ndim == 2
    if not form or positions.shape[1] != total - length or len(positions) not in (1, rows):
        return "position_ids are not one per token: leave them out if it can be"
    wanted = torch.arange(length, total, device=positions.device)[None]
    if starts is not None:
        wanted = (wanted - starts).clamp(min=0)
    if bool((positions == wanted).all()):
        return None
    return (
        "position_ids are not the places of the tokens in their rows: leave them out if it can be"
    )


def _place_refusal(what: str, tensor: torch.Tensor, module: Any) -> str | None:
    place = module.get_input_embeddings().weight.device
    if tensor.device == place:
        return None
    return Asked(f"{what} are on {tensor.device}, the model is on {place}")


def same_mask(first: Any, mask: torch.Tensor | None) -> bool:
    """Whether two attention masks hide the same tokens; ``first`` is ``...`` if nobody knows it."""
    if first is mask:
        return True
    if first is None or mask is None:
        only: Any = mask if first is None else first
        return only is not ... and bool(only.all())
    return first is not ... and torch.equal(first, mask)


def rows_refusal(ids: Any, bucket: Bucket) -> str | None:
    if isinstance(ids, torch.Tensor) and len(ids) != bucket.size.batch:
        rows = f"{len(ids)} rows, {contract.CACHE} {bucket.size.batch}"
        return Asked(f"decoder_input_ids have {rows}")
    return None


def bucket_refusal(decoder: Decoder, bucket: Bucket) -> str | None:
    """Why a decoder cannot go on with a KV cache that may be another's."""
    same = (bucket.target, bucket.device) == (decoder.target, decoder.device)
    if same and decoder.shape.same_buffers(bucket.shape):
        return None
    return f"{contract.CACHE} was made by another engine"
