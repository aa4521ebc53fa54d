"""Comparing one random `generate` call on the stock class, the HF loop and the fast loop."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastgen import EngineOptions
from fastgen.generation import beam_loop, loop
from tests.configs import build_pair
from tests.generation.calls import GenerateCall, keywords, outcome

#: Far above the rounding of scores in fp32 (a temperature of 0.3 triples that of logits).
TOLERANCE = {"rtol": 1e-3, "atol": 3e-3}


class Place(NamedTuple):
    """Where models compute, and in what."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rounding: float = 5e-5
    """Error of the stock logits: on the CPU up to 1e-4 away from their values in float64."""


CPU = Place()


@functools.cache
def models(variant: str, place: Place = CPU) -> dict[str, Any]:
    """The stock class, the HF loop on the engine, and the fast loop; small buckets, so that most
    calls outgrow some."""
    pair = build_pair(variant)
    found = {"stock": pair.stock, "HF loop": pair.fast, "fast loop": pair.fast}
    for path, model in found.items():
        found[path] = copy.deepcopy(model).to(place.device, place.dtype)
    for path, fast_loop in (("HF loop", False), ("fast loop", True)):
        found[path].engine_options = EngineOptions(fast_loop=fast_loop, min_bucket=4)
    return found


def run(path: str, call: GenerateCall, place: Place = CPU) -> dict[str, Any]:
    """What a call does on one of the models."""
    model = models(call.variant, place)[path]
    uneven = model.config.num_decoder_layers != model.config.num_layers
    return outcome(model, call, grows=path == "stock" and uneven)


@contextmanager
def loops_run() -> Iterator[list[str]]:
    """The fast loop's decoding methods that the body runs, by name."""
    ran: list[str] = []

    def spy(name: str, function: Any) -> Any:
        def wrapper(call: Any) -> Any:
            ran.append(name)
            return function(call)

        return wrapper

    with (
        mock.patch.object(loop, "sample", spy("sample", loop.sample)),
        mock.patch.object(beam_loop, "beam_search", spy("beam_search", beam_loop.beam_search)),
    ):
        yield ran


def difference(expected: dict[str, Any], found: dict[str, Any], generator: bool = True) -> str:
    """What differs first between two outcomes of a call; empty if nothing does."""
    names = [name for name in expected if generator or name != "generator"]
    if expected.keys() != found.keys():
        return f"{expected.get('error') or 'outputs'} against {found.get('error') or 'outputs'}"
    for name in names:
        try:
            exact = name in ("sequences", "beam_indices", "streamed", "generator", "continued")
            tolerance = {"rtol": 0, "atol": 0} if exact else TOLERANCE
            if name in ("type", "error", "log", "past length"):
                assert expected[name] == found[name], f"{expected[name]} != {found[name]}"
            else:
                _assert_close(expected[name], found[name], tolerance)
        except AssertionError as error:
            return f"{name}: {error}"
    return ""


def tokens(found: dict[str, Any]) -> dict[str, Any]:
    """Of what a call did, that which is right or wrong whatever the dtype."""
    names = ("error", "type", "sequences", "past length", "streamed")
    return {name: value for name, value in found.items() if name in names}


def _assert_close(expected: Any, found: Any, tolerance: dict[str, float]) -> None:
    if expected is None or found is None:
        assert expected is found
    else:
        torch.testing.assert_close(found, expected, **tolerance, equal_nan=True)


def hangs_on_a_near_tie(call: GenerateCall, place: Place = CPU) -> bool:
    """Whether noise as small as rounding changes what the stock model itself returns.

    Values are looked at on the CPU only: elsewhere the noise exceeds their tolerance.
    """
    head = models(call.variant, place)["stock"].lm_head
    view = dict if place == CPU else tokens
    expected = view(run("stock", call, place))
    generator = torch.Generator().manual_seed(0)

    def add_noise(module: Any, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(logits.shape, generator=generator)
        return logits + (place.rounding * noise).to(logits)

    hook = head.register_forward_hook(add_noise)
    try:
        return any(difference(expected, view(run("stock", call, place))) for _ in range(20))
    finally:
        hook.remove()


def check_call(call: GenerateCall) -> str:
    """Compare all paths of a call; gives what differs, empty if nothing does."""
    expected = run("stock", call)
    decoded = "error" not in expected
    wanted = ["beam_search" if call.beams > 1 else "sample"]
    for path, loops in (("HF loop", []), ("fast loop", wanted)):
        with loops_run() as ran:
            found = run(path, call)
        if decoded:
            explanation = models(call.variant)[path].explain(**keywords(call, []))
            if explanation.path != path:
                return f"{path}: explain() says {explanation}"
            if ran != loops:
                return f"{path}: {ran} ran instead of {loops}"
        if differs := difference(expected, found):
            return f"{path}: {differs}"
    return ""
