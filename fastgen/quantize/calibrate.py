"""Calibration: a program's batches run through a Fast encoder, whose layers' ranges are noted."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from fastgen.calibration import Calibration, Range
from fastgen.fallback import said
from fastgen.hf.module import EngineModule
from fastgen.quantize.ranges import Method, Observer
from fastgen.tasks.encoder import FastEncoder

INPUT, OUTPUT = ":input", ":output"


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, Any]],
    method: Method = "percentile",
    percentile: float = 99.99,
    *,
    attention: bool = False,
    residuals: bool = False,
) -> Calibration:
    """Find the ranges of a model's activations, and let its engine compute in 8-bit integers.

    Each batch runs through the stock modules, without gradients and in evaluation mode, and what
    each linear layer of the encoder reads is noted; padding is left out. The model then has the
    result as ``model.calibration``: ``save_pretrained`` writes it beside the checkpoint, and
    assigning None computes in the model's own dtype again.

    Args:
        model: a Fast encoder, or a Fast model over one (a task class of BERT, say).
        batches: dicts of tensors, as the model takes them; a DataLoader, for example.
        method: how ranges follow from what was seen (see ``Observer``).
        percentile: of all numbers, how many per cent a range holds; for ``percentile`` alone.
        attention: multiply 8-bit integers in attention, too.
        residuals: round to 8-bit integers what is added to residual streams, too.

    Raises:
        ValueError: a method that does not exist, no batch, or numbers that are not finite.
        TypeError: the model has no Fast encoder, or a batch is no dict.
    """
    stack, seen = encoder_of(model), Observer(method, percentile)
    with _evaluating(model), _watched(stack, seen, attention or residuals) as watch, said():
        for batch in tqdm(batches, desc="calibrating", unit="batch", leave=False):
            watch(batch)
            model(**_placed(batch, next(stack.parameters()).device))
    if not seen.names():
        raise ValueError("batches gave nothing to calibrate by: at least one is needed.")
    found = {INPUT: dict[str, Range](), OUTPUT: dict[str, Range]()}
    for name in tqdm(seen.names(), desc=f"ranges by {method}", delay=1.0, leave=False):
        layer, colon, side = name.rpartition(":")
        found[colon + side][layer] = seen.range(name)
    words = f"percentile {percentile}" if method == "percentile" else method
    result = Calibration(found[INPUT], found[OUTPUT], attention, residuals, words)
    assert isinstance(model, EngineModule)
    model.calibration = result
    return result


def encoder_of(model: torch.nn.Module) -> FastEncoder:
    """The one stack of a model that may be calibrated.

    Raises:
        TypeError: it has none, or several.
    """
    stacks = [part for part in model.modules() if isinstance(part, FastEncoder)]
    if len(stacks) != 1:
        kind = type(model).__qualname__
        raise TypeError(
            f"{kind} has {len(stacks)} Fast encoders, where calibration is of one: load the model "
            "by a class of fastgen that has an encoder, such as FastBertModel."
        )
    return stacks[0]


def linear_layers(stack: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """A stack's linear layers by name."""
    kinds = torch.nn.Linear, Conv1D
    return {name: part for name, part in stack.named_modules() if isinstance(part, kinds)}


class _Watch:
    """Shows an Observer the tokens of a batch that are no padding."""

    def __init__(self, seen: Observer) -> None:
        self.seen = seen
        self._mask: torch.Tensor | None = None

    def __call__(self, batch: Any) -> None:
        """A batch that is about to run."""
        if not isinstance(batch, Mapping):
            kind = type(batch).__name__
            raise TypeError(f"a batch is a {kind}: dicts of tensors by the model's arguments.")
        mask = batch.get("attention_mask")
        # the heads that read several choices hand them to their stack as rows
        self._mask = None if mask is None else mask.flatten(0, -2).bool()

    def note(self, name: str, tensor: torch.Tensor) -> None:
        mask = self._mask
        if mask is not None and tensor.shape[: mask.ndim] == mask.shape:
            tensor = tensor[mask.to(tensor.device)]
        self.seen.see(name, tensor.detach().float().cpu().numpy())


@contextmanager
def _watched(stack: torch.nn.Module, seen: Observer, outputs: bool) -> Iterator[_Watch]:
    """Hooks on all linear layers, while the body runs."""
    watch = _Watch(seen)

    def before(name: str, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        watch.note(name + INPUT, given[0])

    def after(name: str, _: Any, given: Any, result: torch.Tensor) -> None:
        watch.note(name + OUTPUT, result)

    with ExitStack() as hooks:
        for name, layer in linear_layers(stack).items():
            hooks.callback(layer.register_forward_pre_hook(partial(before, name)).remove)
            if outputs:
                hooks.callback(layer.register_forward_hook(partial(after, name)).remove)
        yield watch


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without gradients or dropout; the modules' modes are afterwards what they were."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _placed(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
