"""A call of a decoding method: what transformers hands to it, and the engine that serves it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MaxLengthCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria

from fastgen.execution.decoder import Decoder
from fastgen.generation.plan import ProcessorPlan, runs_code_of_the_user
from fastgen.hf.cache import LeasedCache


@dataclass
class Call:
    """What transformers hands to a decoding method, and the engine that serves it."""

    decoder: Decoder
    input_ids: torch.Tensor
    processors: Any
    criteria: Any
    config: Any
    streamer: Any
    hidden: torch.Tensor | None
    """What the encoder gave [B, S, E]; None without one."""
    mask: torch.Tensor | None
    """Of the encoder's tokens [B, S], or without one of the prompt's."""
    cache: LeasedCache
    look: Callable[[], None] | None = None
    """Called once, behind the first launches: raises an error if they must not count."""

    def __post_init__(self) -> None:
        self.prompt = self.input_ids.shape[1]
        lengths = [c.max_length for c in self.criteria if isinstance(c, MaxLengthCriteria)]
        self.limit = max(min(lengths), self.prompt + 1)  # criteria are asked after a token
        self.has_eos = any(hasattr(c, "eos_token_id") for c in self.criteria)
        eos = [c.eos_token_id for c in self.criteria if type(c) is EosTokenCriteria]
        # a user's own criterion may keep its tokens on the CPU
        self.eos: torch.Tensor | None = eos[0].to(self.decoder.device) if eos else None
        known = all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in self.criteria)
        self.plain = known and len(eos) <= 1
        """Whether length and end-of-sequence tokens alone stop a row, which the device can see."""
        foreign = any(runs_code_of_the_user(p) for p in self.processors)
        self.waits = self.streamer is not None or foreign or not self.plain
        """Whether each token must be known on the host before the next."""

    def plan(self) -> ProcessorPlan:
        """How the processors take part in a captured graph."""
        known: dict[int, Hashable] = {
            id(self.config._eos_token_tensor): ("eos", str(self.config.eos_token_id))
        }
        return ProcessorPlan(list(self.processors), known)


def keeps(call: Call, output: str) -> bool:
    return bool(call.config.return_dict_in_generate and getattr(call.config, output))


def records(call: Call) -> bool:
    return keeps(call, "output_scores") or keeps(call, "output_logits")
