"""Random draws of captured steps: torch's own numbers in torch's order, drawn outside of the graph.

A CUDA graph that draws itself must have the generator to itself while it is captured: draws of
other threads then fail. So the random numbers behind ``torch.multinomial`` are drawn before each
replay, as stock would draw them, and the graph only chooses with them.
"""

from functools import cache

import torch


class Draws:
    """The draws of one batch."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._noise = torch.ones(rows, columns, device=device)

    def draw(self) -> None:
        """Queue new random numbers: what the next ``multinomial`` takes from the generator."""
        self._noise.exponential_()

    def multinomial(self, probabilities: torch.Tensor, count: int) -> torch.Tensor:
        """``torch.multinomial(probabilities, count)``: float32 [rows, columns] to [rows, count]."""
        valid = (probabilities.max() < torch.inf) & (probabilities.min() >= 0)
        torch._assert_async(valid, "probability tensor contains either `inf`, `nan` or element < 0")
        return _choose(probabilities, self._noise, count)


def _choose(probabilities: torch.Tensor, noise: torch.Tensor, count: int) -> torch.Tensor:
    ratios = probabilities / noise
    if count == 1:
        return ratios.argmax(dim=-1, keepdim=True)
    return torch.topk(ratios, count)[1]


@cache
def are_torchs(device: torch.device) -> bool:
    """Whether this version of torch draws so on this device: the same choices, and the generator
    left in the same state."""
    theirs, ours = (torch.Generator(device) for _ in range(2))
    for rows, columns, count in ((1, 61, 1), (3, 4099, 1), (2, 33000, 1), (2, 4099, 8)):
        theirs.manual_seed(columns)
        ours.manual_seed(columns)
        places = torch.arange(rows * columns, device=device).view(rows, columns)
        probabilities = torch.softmax((places * 0.7).sin() * 3, dim=-1)
        expected = torch.multinomial(probabilities, count, generator=theirs)
        noise = torch.empty_like(probabilities).exponential_(generator=ours)
        same = torch.equal(expected, _choose(probabilities, noise, count))
        if not same or not torch.equal(theirs.get_state(), ours.get_state()):
            return False
    return True
