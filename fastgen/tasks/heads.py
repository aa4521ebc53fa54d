"""Whole models over Fast stacks, and those whose own code stays the stock class's: every head."""

from typing import Any

from fastgen.hf import contract
from fastgen.hf.loading import FastPreTrained
from fastgen.tasks.decoder import FastDecoder
from fastgen.tasks.encoder import FastEncoder

# What a whole model's own code does not hand on to its stacks under this name
_OF_THE_WHOLE: tuple[str, ...] = (
    *("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"),
    *("encoder_outputs", "inputs_embeds", "decoder_inputs_embeds", "use_cache", contract.CACHE),
    *("labels", "start_positions", "end_positions", "next_sentence_label"),
)


class FastWhole(FastPreTrained):
    """Mixin of a whole model whose stacks are Fast ones: which of them torch runs, and why."""

    def _fast_stacks(self) -> list[FastEncoder | FastDecoder]:
        return [part for part in self.modules() if isinstance(part, FastEncoder | FastDecoder)]

    def stacks_refusal(self, **kwargs: Any) -> str | None:
        """Why torch runs a stack in a stock forward with these arguments; None if engines serve
        them all."""
        others = {name: value for name, value in kwargs.items() if name not in _OF_THE_WHOLE}
        encoded, ids = kwargs.get("encoder_outputs"), kwargs.get("decoder_input_ids")
        for stack in self._fast_stacks():
            if isinstance(stack, FastDecoder):
                call = {
                    # heads that get no tokens for it shift the encoder's
                    "input_ids": kwargs.get("input_ids") if ids is None else ids,
                    "attention_mask": kwargs.get("decoder_attention_mask"),
                    "inputs_embeds": kwargs.get("decoder_inputs_embeds"),
                    "encoder_hidden_states": ... if encoded is None else encoded[0],
                    "encoder_attention_mask": kwargs.get("attention_mask"),
                    contract.CACHE: contract.given_cache(kwargs),
                }
            elif encoded is None:
                names = "input_ids", "attention_mask", "inputs_embeds"
                call = {name: kwargs.get(name) for name in names}
            else:
                continue
            if reason := stack.refusal(**call, **others):
                return reason
        return None


class FastTask(FastWhole):
    """Mixin of a whole model whose own code is the stock class's: its stacks do the work."""

    def compile_engine(self) -> None:
        """Build the engines of all stacks now (and store them in the engine cache)."""
        for stack in self._fast_stacks():
            stack.compile_engine()

    def refusal(self, **kwargs: Any) -> str | None:
        """Why a forward with these arguments goes to torch, in part at least; None if the engines
        serve both stacks."""
        return self.stacks_refusal(**kwargs)
