"""Which arguments no engine serves, whatever the model, and why."""

from typing import Any

import torch

from fastgen.modeling import EngineModule


def common_refusal(module: EngineModule, kwargs: dict[str, Any]) -> str | None:
    """What no engine serves, whatever the model."""
    if module.training:
        return "the model is in training mode: call model.eval()"
    if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        return "gradients may be asked for: wrap the call in torch.no_grad()"
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "torch is tracing or compiling the model"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "torch.autocast is on: load the model in the dtype to compute in instead"
    asked = kwargs.pop("output_attentions", None)
    if asked or (asked is None and getattr(module.config, "output_attentions", False)):
        return "output_attentions are recorded by torch only"
    return _states_refusal(module, kwargs)


def states_wanted(module: EngineModule, kwargs: dict[str, Any]) -> Any:
    """What a call says of ``output_hidden_states``, or else the config, as in transformers."""
    default = getattr(module.config, "output_hidden_states", False)
    return kwargs.get("output_hidden_states", default)


def _states_refusal(module: EngineModule, kwargs: dict[str, Any]) -> str | None:
    wanted, backend = states_wanted(module, kwargs), module.engine_options.backend
    kwargs.pop("output_hidden_states", None)
    if isinstance(wanted, (list, tuple, set)):
        return "output_hidden_states of chosen layers are recorded by torch only"
    if wanted and "tensorrt" in backend:
        return f"output_hidden_states are recorded by ONNX Runtime or torch, not by {backend}"
    return None


def ids_refusal(module: Any, ids: Any) -> str | None:
    """Token ids that torch reports as wrong, while the engine would read some row for them."""
    if not isinstance(ids, torch.Tensor):
        return None  # explain() was asked
    if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        return f"token ids are {ids.ndim}-dimensional {ids.dtype}, not [B, Q] of int64"
    vocabulary = module.get_input_embeddings().weight.shape[0]
    if ids.device.type == "cpu" and ids.numel():  # on a GPU a look at them would wait for it
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= vocabulary:
            return f"token ids from {low} to {high} are not all in 0 .. {vocabulary - 1}"
    return None


def mask_refusal(mask: torch.Tensor | None, shape: torch.Size) -> str | None:
    if mask is None or mask.shape == shape[:2]:
        return None
    return f"attention_mask is {list(mask.shape)}, not {list(shape[:2])}: one value per token"


def same_mask(first: Any, mask: torch.Tensor | None) -> bool:
    """Whether two attention masks hide the same tokens; ``first`` is ``...`` if nobody knows it."""
    if first is mask:
        return True
    if first is None or mask is None:
        only: Any = mask if first is None else first
        return only is not ... and bool(only.all())
    return first is not ... and torch.equal(first, mask)
