"""Models on the GPU for the tests in this folder, and the references they are compared with."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from fastgen import FastT5
from fastgen.hf.contract import CACHE
from tests.configs import Pair, build_pair

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Head and layer sizes as real checkpoints have them.
MEDIUM: dict[str, Any] = {
    "vocab_size": 512,
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 512,
    "num_heads": 4,
    "num_layers": 4,
    "decoder_start_token_id": 0,
}


@functools.cache
def cuda_pair(name: str) -> Pair:
    """Both models of a variant in fp32 on the GPU; not to be changed."""
    pair = copy.deepcopy(build_pair(name))
    return Pair(pair.stock.to(DEVICE), pair.fast.to(DEVICE))


def cuda_copies(name: str = "t5-1.1", dtype: torch.dtype = torch.float32) -> Pair:
    """Both models of a variant on the GPU, for one test to change."""
    pair = copy.deepcopy(build_pair(name))
    return Pair(pair.stock.to(DEVICE, dtype), pair.fast.to(DEVICE, dtype))


def medium_stock(seed: int = 0, **fields: Any) -> Any:
    """A model of real head size with random weights, fp32 on the CPU."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**MEDIUM | fields)).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.data.normal_(std=2.0)
    return model


def fast_of(stock: Any, dtype: torch.dtype, options: Mapping[str, Any] | None = None) -> Any:
    """The Fast model with a stock model's weights, on the GPU."""
    model = FastT5(copy.deepcopy(stock.config)).eval()
    model.load_state_dict(stock.state_dict())
    model.engine_options = options
    return model.to(DEVICE, dtype)


def ids(rows: int, length: int, vocabulary: int = 96, seed: int = 1) -> torch.Tensor:
    """Random token ids on the GPU, int64 [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (rows, length), generator=generator).to(DEVICE)


def mask(rows: int, length: int) -> torch.Tensor:
    """Row i hides 3 * i tokens: at its start in odd rows, at its end in even ones."""
    keep = torch.arange(length) < (length - 3 * torch.arange(rows)).clamp(min=1)[:, None]
    keep[1::2] = keep[1::2].flip(-1)
    return keep.long().to(DEVICE)


def ragged(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """A mask with holes and padding on both sides; no row is empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < torch.rand(rows, 1, generator=generator)
    mask[:, length // 2] = True
    return mask.long().to(DEVICE)


def masked(kind: str | None, rows: int, length: int) -> dict[str, torch.Tensor]:
    """A mask as an argument, by its kind: ``right`` hides the ends of rows, None nothing."""
    if kind is None:
        return {}
    lengths = torch.linspace(length, 1, rows, device=DEVICE)
    right = (torch.arange(length, device=DEVICE) < lengths[:, None]).long()
    return {"attention_mask": right if kind == "right" else ragged(rows, length)}


def distance(model: Any, call: Mapping[str, torch.Tensor], exact: torch.Tensor) -> float:
    """Relative distance of hidden states from their exact values, where nothing is hidden."""
    found = model(**call)[0].double().cpu()
    seen = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool().cpu()
    return float((found - exact)[seen].norm() / exact[seen].norm())


def first_logits(call: Mapping[str, torch.Tensor], *models: Any) -> list[torch.Tensor]:
    """Of the first token that each generates."""
    kwargs: dict[str, Any] = {"max_new_tokens": 1, "output_logits": True}
    kwargs |= {"return_dict_in_generate": True, "do_sample": False, "pad_token_id": 0}
    return [model.generate(**call, **kwargs).logits[0] for model in models]


@torch.no_grad()
def decoded(model: Any, call: Mapping[str, torch.Tensor], prefill: int = 4) -> torch.Tensor:
    """Logits [B, Q, V] of a prefill and then one step for each further token."""
    prompt = call["decoder_input_ids"]
    output = model(**dict(call) | {"decoder_input_ids": prompt[:, :prefill]}, use_cache=True)
    found = [output.logits]
    for i in range(prefill, prompt.shape[1]):
        output = model(
            encoder_outputs=(output.encoder_last_hidden_state,),
            attention_mask=call.get("attention_mask"),
            decoder_input_ids=prompt[:, i : i + 1],
            **{CACHE: output[CACHE]},
            use_cache=True,
        )
        found.append(output.logits)
    return torch.cat(found, 1)


@torch.no_grad()
def reference(stock: Any, call: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits in float64 on the CPU, computed with the given model's own (rounded) weights."""
    exact = copy.deepcopy(stock).to("cpu", torch.float64)
    return exact(**{name: value.cpu() for name, value in call.items()}).logits


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative distance of logits from their exact values."""
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()
