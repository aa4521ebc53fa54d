"""Which installed logits processors may run inside a captured CUDA graph, and when.

They run there as they are: nothing is written anew. A graph replays the same kernels for every
token, so only processors whose kernels do not change from token to token qualify.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from transformers.generation import logits_process as hf

# Functions of the scores alone
_SCORES_ONLY = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
)

# Functions of the scores and of the length n; active for a span of lengths, then inert
_UNTIL_LENGTH: dict[type, Callable[[Any, int], bool]] = {
    hf.MinLengthLogitsProcessor: lambda p, n: n < p.min_length,
    hf.MinNewTokensLengthLogitsProcessor: (
        lambda p, n: n - p.prompt_length_to_skip < p.min_new_tokens
    ),
}

# As above, but active at one length only, which is not worth a graph
_AT_LENGTH: dict[type, Callable[[Any, int], bool]] = {
    hf.ForcedBOSTokenLogitsProcessor: lambda p, n: n == 1,
    hf.ForcedEOSTokenLogitsProcessor: lambda p, n: n == p.max_length - 1,
    hf.SuppressTokensAtBeginLogitsProcessor: lambda p, n: n == p.begin_index,
}


def reads_set_of_tokens(processor: Any) -> bool:
    """Whether a processor takes its tokens as a set, so that repeating some changes nothing."""
    return (
        type(processor) is hf.RepetitionPenaltyLogitsProcessor
        and processor.prompt_ignore_length is None
    )


def runs_code_of_the_user(processor: Any) -> bool:
    """Whether a processor may do more than change scores, or fail on tokens past the end."""
    known = type(processor).__module__ == hf.__name__
    return not known or type(processor) is hf.PrefixConstrainedLogitsProcessor


class ProcessorPlan:
    """How one call's processors take part in a captured graph."""

    def __init__(self, processors: list[Any], known: dict[int, Hashable]) -> None:
        """``known`` names tensors (by id) whose values the caller knows without asking the GPU."""
        self.processors = processors
        self.obstacle = next((type(p).__name__ for p in processors if not _static(p)), None)
        """Name of a processor that a graph cannot hold; None if all can be captured."""
        self.signature: Hashable = None
        if self.obstacle is None:
            self.signature = tuple(_signature(p, known) for p in processors)

    def phase(self, length: int) -> tuple[bool, ...] | None:
        """Which span-bound processors are active; None where the token is not worth a graph."""
        if any(_AT_LENGTH[type(p)](p, length) for p in self.processors if type(p) in _AT_LENGTH):
            return None
        spans = ((p, _UNTIL_LENGTH.get(type(p))) for p in self.processors)
        return tuple(active(p, length) for p, active in spans if active is not None)

    def process(
        self, view: torch.Tensor, as_set: Callable[[], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The processors as one function of the scores, valid for every length of the phase.

        Args:
            view: [rows, length] tokens, of which only the length is read.
            as_set: gives [rows, capacity] tokens whose unfilled places repeat filled ones.
        """
        processors = list(self.processors)

        def process(scores: torch.Tensor) -> torch.Tensor:
            for processor in processors:
                ids = as_set() if reads_set_of_tokens(processor) else view
                scores = processor(ids, scores)
            return scores

        return process


def _static(processor: Any) -> bool:
    kinds = (*_SCORES_ONLY, *_UNTIL_LENGTH, *_AT_LENGTH)
    return type(processor) in kinds or reads_set_of_tokens(processor)


def _signature(processor: Any, known: dict[int, Hashable]) -> Hashable:
    """A processor's type and parameters: equal signatures mean equal functions."""
    values: list[Hashable] = [type(processor).__name__]
    for name, value in sorted(vars(processor).items()):
        if isinstance(value, torch.Tensor):
            values.append((name, known.get(id(value)) or str(value.tolist())))
        else:
            values.append((name, value if isinstance(value, Hashable) else repr(value)))
    return tuple(values)
