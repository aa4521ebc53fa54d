"""Which path a call takes, and why not a faster one: ``explain`` and ``explain_forward``."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from fastgen.options import EngineOptions


@dataclass(frozen=True)
class Explanation:
    """Which path a call takes, and why not a faster one."""

    path: str
    """``generate``: ``fast loop``, ``HF loop`` (both on the engine) or ``torch``; ``forward``:
    ``engine`` or ``torch``."""
    reasons: list[str] = field(default_factory=list)
    weights: str = "full"
    """What matrix products on the engine read: ``EngineOptions.weights``, or a checkpoint's."""
    calibration: str | None = None
    """How the ranges were found by which an encoder's engine computes in 8-bit integers; None: it
    computes in the model's own dtype."""
    computes: str | None = None
    """What the engine computes in, where that is not the model's dtype: ``float32`` on a CPU."""

    def __str__(self) -> str:
        path = self.path if self.weights == "full" else f"{self.path}, {self.weights} weights"
        path += f", computed in {self.computes}" if self.computes else ""
        if self.calibration is not None:
            path += f", 8-bit integers by calibration ({self.calibration})"
        return "\n".join([path, *(f"  - {reason}" for reason in self.reasons)])


class Explained:
    """Mixin of a module that an engine may serve."""

    attends = False
    """Whether ``forward`` needs the hidden states of an encoder."""
    engine_options: EngineOptions
    dtype: torch.dtype
    _computes_in: Any
    forward: Any
    narrow_weights: Any
    """What engines read of a checkpoint in fewer bits, in words, or None."""
    narrow_reasons: Any
    """Why not by the fastest kernels."""
    calibration_in_use: Any
    """How an encoder's calibration was found, if its engine computes by that, and in words of what
    it is not used for."""
    refusal: Any
    """Why ``forward`` with these arguments goes to torch; None if the engine serves it."""

    def stacks_refusal(self, **kwargs: Any) -> str | None:
        """Why torch runs some stack of it even so: a refused model may leave the work to engines
        of its stacks. None if it runs none."""
        refusal: str | None = self.refusal(**kwargs)
        return refusal

    def explain_forward(self, **forward_kwargs: Any) -> Explanation:
        """Say what serves ``self(**forward_kwargs)`` here and now, without running it.

        What is left out is taken to be served. Gradients count: outside of ``torch.no_grad()`` a
        model with trainable weights is torch's. The path is ``torch`` where torch runs a stack.
        """
        call = _with_ids(self.forward, forward_kwargs, self.attends)
        reasons, by_torch = [self.refusal(**call)], None
        encoder = getattr(self, "encoder", None)
        if reasons[0] is not None:
            by_torch = self.stacks_refusal(**call)
        elif isinstance(encoder, Explained) and call.get("encoder_outputs") is None:
            names = "input_ids", "attention_mask", "inputs_embeds"
            by_torch = encoder.refusal(**{name: call.get(name) for name in names})
        if by_torch not in reasons:
            reasons.append(by_torch)
        said = [str(reason) for reason in reasons if reason]
        if by_torch:
            return Explanation("torch", said)
        return self._by_engine("engine", said)

    def _by_engine(self, path: str, reasons: list[str]) -> Explanation:
        """A path over the engine, with what that computes by."""
        method, unused = self.calibration_in_use()
        computes, weights = self._computes_in(), self.narrow_weights()
        wide = None if computes == self.dtype else str(computes).removeprefix("torch.")
        weights = weights or self.engine_options.weights
        reasons = [*reasons, *unused, *self.narrow_reasons()]
        return Explanation(path, reasons, weights, method, wide)

    def explain(self, **forward_kwargs: Any) -> Explanation:
        """As ``explain_forward``: a model that does not generate does nothing else."""
        return self.explain_forward(**forward_kwargs)


def _with_ids(forward: Any, given: dict[str, Any], attends: bool) -> dict[str, Any]:
    """The arguments of a call, with token ids that stand for those it leaves out."""
    call, names = dict(given), inspect.signature(forward).parameters

    def lacks(*others: str) -> bool:
        return others[0] in names and all(call.get(name) is None for name in others)

    if lacks("decoder_input_ids", "decoder_inputs_embeds", "labels"):
        call["decoder_input_ids"] = ...
    if attends and lacks("encoder_hidden_states"):
        call["encoder_hidden_states"] = ...
    if lacks("input_ids", "inputs_embeds", "encoder_outputs"):
        mask, targets = call.get("attention_mask"), call.get("decoder_input_ids")
        rows = len(targets) if isinstance(targets, torch.Tensor) else 1
        shape = (rows, 1) if mask is None else tuple(mask.shape)
        stand_in = torch.zeros(shape, dtype=torch.int64)
        call["input_ids"] = ... if attends else stand_in
    return call
