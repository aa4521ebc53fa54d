"""Models that torch serves to their owner's surprise, and what is said of it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastgen import FallbackWarning
from tests.helpers import sources


@contextmanager
def said() -> Iterator[list[warnings.WarningMessage]]:
    """The FallbackWarnings of the body."""
    found: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [warning for warning in caught if warning.category is FallbackWarning]


def generate(model: Any, **call: Any) -> Any:
    return model.generate(sources(), max_new_tokens=4, **call)


class Adapted(torch.nn.Module):
    """What PEFT puts around a Linear."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(base.in_features, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def adapt(model: Any) -> None:
    for stack in (model.encoder, model.decoder):
        attention = stack.block[0].layer[0].SelfAttention
        attention.q, attention.v = Adapted(attention.q).eval(), Adapted(attention.v).eval()


def adapt_in_half(model: Any) -> None:
    """Adapters are kept in float32 whatever the model is in, which is not what is wrong."""
    adapt(model)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.double()


class Linear8bit(torch.nn.Linear):
    """As bitsandbytes does: integers in the place of weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 64)


def quantise(model: Any) -> None:
    linear = model.decoder.block[0].layer[0].SelfAttention.q
    linear.__class__ = Linear8bit
    whole = (64 * linear.weight.detach()).to(torch.int8)
    linear.weight = torch.nn.Parameter(whole, requires_grad=False)


def wrap_norm(model: Any) -> None:
    class Norm(type(model.decoder.final_layer_norm)):  # type: ignore[misc]
        pass

    model.decoder.final_layer_norm.__class__ = Norm


#: What surprises, and words of the reason and of the remedy.
SURPRISES: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "float64": (lambda m: m.double(), ("float64", "model.float()")),
    "training": (lambda m: m.train(), ("training mode", "model.eval()")),
    "training of a part": (lambda m: m.decoder.dropout.train(), ("Dropout", "model.eval()")),
    "backend": (lambda m: setattr(m, "engine_options", {"backend": "tensorrt"}), ("NVIDIA",)),
    "hook": (lambda m: m.lm_head.register_forward_hook(lambda *_: None), ("hooks", "remove")),
    "adapter": (adapt, ("SelfAttention.q is a", "merge_and_unload()")),
    "adapter in another dtype": (adapt_in_half, ("adapter", "merge_and_unload()")),
    "int8": (quantise, ("torch.int8", "quantised")),
    "foreign module": (wrap_norm, ("Norm", "which no graph knows")),
}
