"""Engines in float16 by what was found, on a GPU: where weights are scaled until naive float16
overflows, and where nothing needs float32."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.hf import found
from fastgen.precision import find_unstable
from tests.gpu.models import DEVICE
from tests.precision.overflowing import FAMILIES, scaled

pytestmark = pytest.mark.cuda

#: What fused kernels cannot give in float32: the tool's answer is then ONNX Runtime's to serve.
NOT_FUSED = {
    "t5-1.0": (".wi.weight", 2e4),
    "t5-1.1": (".wi_1.weight", 2e4),
    "bert": FAMILIES["bert"],
}


@pytest.fixture(autouse=True)
def remembered_by_one_test(engine_cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "_here", {})


def call(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    names = ["input_ids", "decoder_input_ids"][: 1 + model.config.is_encoder_decoder]
    found = {n: torch.randint(3, 96, (6, 9), generator=generator).to(DEVICE) for n in names}
    if model.config.model_type == "umt5":  # not causal within several tokens in transformers 5.17
        found["decoder_input_ids"] = found["decoder_input_ids"][:, :1]
    return found


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    """Logits, or hidden states where there is no head, float32 on the CPU."""
    given = call(model)
    assert model.refusal(**given) is None
    return model(**given)[0].float().cpu()


@torch.no_grad()
def steps(model: Any) -> torch.Tensor:
    """The scores [B, V] of each of 6 tokens that the engine's steps decode, the same for all."""
    generated = model.generate(
        call(model)["input_ids"],
        max_new_tokens=6,
        min_new_tokens=6,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(generated.logits).float().cpu()


def error(low: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((low - exact).norm() / exact.norm()).nan_to_num(float("inf")))


def models(name: str, part: str = "", factor: float = 1.0) -> tuple[Any, Any, float]:
    """A model in float32, the same in float16 by what was found, and the error that was told."""
    exact = scaled(name, part, factor).to(DEVICE)
    low = copy.deepcopy(exact)
    precision = find_unstable(low)
    assert not precision.problems
    return exact, low.half(), precision.errors.found


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "onnxruntime"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scaled_models_are_finite_and_near_to_float32(name: str, fused: bool) -> None:
    exact, low, told = models(name, *FAMILIES[name])
    low.engine_options = {"fused_kernels": fused}
    found = outputs(low)
    assert found.isfinite().all()
    assert error(found, outputs(exact)) < max(0.03, 2 * told)
    if hasattr(low, "generate"):
        first = steps(low)[0], steps(exact)[0]  # later ones follow tokens, which may be others
        assert steps(low).isfinite().all() and error(*first) < max(0.03, 2 * told)


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_fused_kernels_cannot_keep_is_onnx_runtimes(name: str) -> None:
    exact, low, told = models(name, *NOT_FUSED[name])
    assert error(outputs(low), outputs(exact)) < max(0.03, 2 * told)
    if name == "bert":
        assert low._engine.fused is None
    else:
        assert steps(low).isfinite().all()
        assert low._engine.steps_fused() is False


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "onnxruntime"])
@pytest.mark.parametrize("name", FAMILIES)
def test_without_any_float32_ordinary_models_are_near_to_it(name: str, fused: bool) -> None:
    """The whole graph in float16, its kernels that add and norm in one, too."""
    exact, low, told = models(name)
    low.engine_options = {"fused_kernels": fused}
    assert error(outputs(low), outputs(exact)) < max(0.03, 2 * told)
    engine = low._engine
    assert engine.target.wide == ()
