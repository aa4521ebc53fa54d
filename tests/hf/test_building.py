"""What of a module no graph knows: torch serves it, and says what it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize

from tests.configs import TINY
from tests.helpers import assert_left_to_torch, assert_served, copies, sources

Change = Callable[[Any], Any]


def replace_activation(model: Any) -> None:
    model.decoder.block[0].layer[-1].DenseReluDense.act = Tripled()


class Tripled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


class LoRA(torch.nn.Module):
    """What an adapter library puts around a Linear."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_layer = base
        self.lora_A = torch.nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapt(model: Any) -> None:
    attention = model.decoder.block[0].layer[0].SelfAttention
    attention.q = LoRA(attention.q).eval()


def adapt_encoder(model: Any) -> None:
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.q = LoRA(attention.q).eval()


def squash_head(model: Any) -> None:
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh()).eval()


def patch_forward(model: Any) -> None:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * forward(x)


def parametrize_head(model: Any) -> None:
    parametrize.register_parametrization(model.lm_head, "weight", Tripled().eval())


def hook_block(model: Any) -> None:
    def halve(module: Any, arguments: Any, output: Any) -> Any:
        return (output[0] / 2, *output[1:])

    model.decoder.block[0].register_forward_hook(halve)


def hook_encoder(model: Any) -> None:
    model.encoder.block[0].layer[1].register_forward_pre_hook(lambda module, inputs: (-inputs[0],))


def give_head_a_bias(model: Any) -> None:
    torch.manual_seed(0)
    model.lm_head = torch.nn.Linear(TINY["d_model"], TINY["vocab_size"], bias=True)


def drop_decoder_layer(model: Any) -> None:
    model.decoder.block.pop(1)


LEFT_TO_TORCH: dict[str, tuple[Change, str]] = {
    "double": (lambda model: model.double(), "float64"),
    "activation replaced": (replace_activation, "Tripled"),
    "adapter": (adapt, "SelfAttention.q"),
    "head in a Sequential": (squash_head, "lm_head"),
    "forward replaced": (patch_forward, "forward of a Linear"),
    "parametrized": (parametrize_head, "lm_head"),
    "forward hook": (hook_block, "hooks"),
    "forward pre-hook": (hook_encoder, "hooks"),
    "head with a bias": (give_head_a_bias, "lm_head.bias"),
    "decoder layer dropped": (drop_decoder_layer, "decoder.block.1"),
}


@pytest.mark.parametrize("change", LEFT_TO_TORCH)
def test_torch_serves_what_no_graph_knows(change: str) -> None:
    apply, reason = LEFT_TO_TORCH[change]
    pair = copies()
    for model in (pair.stock, pair.fast):
        apply(model)
    assert_left_to_torch(pair, reason)


def test_torch_serves_an_adapted_encoder_and_the_engine_the_decoder() -> None:
    pair = copies()
    for model in (pair.stock, pair.fast):
        adapt_encoder(model)
    with torch.no_grad():
        assert "SelfAttention.q" in pair.fast.encoder.refusal(input_ids=sources())
    assert_served(pair)
