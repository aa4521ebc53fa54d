"""The random draws of captured steps beside ``torch.multinomial`` (on a GPU: tests/gpu)."""

from unittest import mock

import pytest
import torch

from fastgen.generation import draws
from fastgen.generation.draws import Draws
from tests.generation.calls import GenerateCall
from tests.generation.compare import difference, run
from tests.generation.emulate import gpu_paths

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rows", "columns", "count"), [(1, 96, 1), (3, 32128, 1), (2, 96 * 3, 6)])
def test_the_numbers_and_the_generator_are_torchs(rows: int, columns: int, count: int) -> None:
    drawing = Draws(rows, columns, CPU)
    for seed in range(5):
        torch.manual_seed(seed)
        probabilities = torch.softmax(3 * torch.randn(rows, columns), dim=-1)
        state = torch.get_rng_state()
        expected = torch.multinomial(probabilities, count), torch.multinomial(probabilities, count)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        for tokens in expected:
            drawing.draw()
            assert torch.equal(drawing.multinomial(probabilities, count), tokens)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
def test_no_distribution_is_torchs_error(bad: float) -> None:
    probabilities = torch.tensor([[0.5, bad]])
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        torch.multinomial(probabilities, 1)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        Draws(1, 2, CPU).multinomial(probabilities, 1)


def test_another_way_of_drawing_is_noticed() -> None:
    """Then a captured step holds no draw, and the tokens are stock's as before."""
    assert draws.are_torchs(CPU)
    multinomial = torch.multinomial

    def other(probabilities: torch.Tensor, *args: int, **kwargs: torch.Generator) -> torch.Tensor:
        return multinomial(probabilities.sqrt(), *args, **kwargs)

    arguments = {"max_new_tokens": 9, "do_sample": True, "top_k": 0}
    call = GenerateCall("t5-1.1", 3, 2, None, 1, arguments)
    draws.are_torchs.cache_clear()
    try:
        with mock.patch.object(torch, "multinomial", other), gpu_paths() as keys:
            assert not draws.are_torchs(CPU)
            assert not difference(run("stock", call), run("fast loop", call))
        assert not keys
    finally:
        draws.are_torchs.cache_clear()
