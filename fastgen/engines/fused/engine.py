"""The engine of fused CUDA kernels: a decoder step, one launch after the other."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from fastgen.engine_cache import EngineCache
from fastgen.engines import NotFused, nvrtc
from fastgen.engines.fused.ops import MAX_HEAD_SIZE, MAX_SLOTS, FusedOps, head_size_served
from fastgen.engines.fused.products import TILE_ROWS
from fastgen.engines.fused.prompt import PromptOps
from fastgen.engines.fused.recorder import Narrow
from fastgen.engines.fused.wide import MAX_ROWS, WideOps
from fastgen.engines.nvrtc import Launch, Program
from fastgen.target import Target


def supports(
    target: Target, device: torch.device, batch: int, queries: int, slots: int, head_size: int
) -> str | None:
    """Why the fused kernels cannot run a step of this size; None if they can (sizes that only the
    weights tell are refused by ``bind``)."""
    if target.device != "cuda" or target.kv_layout != "BLHD":
        return f"fused kernels need a GPU and BLHD buffers, not {target.device} {target.kv_layout}"
    if batch * queries > MAX_ROWS:
        return f"{batch} rows of {queries} queries: fused kernels serve {MAX_ROWS} in all"
    if not head_size_served(head_size):
        return f"head size {head_size}: fused kernels serve 16 to {MAX_HEAD_SIZE} by 8"
    if slots > MAX_SLOTS:
        return f"{slots} slots: fused kernels serve {MAX_SLOTS}"
    return nvrtc.refusal(device)


class FusedEngine:
    """The decoder's step over the model's own parameters (see ``Engine``)."""

    def __init__(
        self,
        root: Any,
        target: Target,
        parameters: Mapping[str, torch.Tensor],
        engine_cache: EngineCache | None = None,
        held: Mapping[str, Narrow] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            root: the family's decoder, a ``DecoderRoot``, whose step is recorded.
            parameters: the model's parameters by name, and what is made of them in fewer bits by
                the names of ``blockwise.Format``; they must stay alive and in place.
            engine_cache: where compiled kernels are kept; None compiles them in every process.
            held: which of them a checkpoint has in fewer bits.
        """
        self._held = held
        self.target, self._root, self._engine_cache = target, root, engine_cache
        self._parameters = parameters
        self._own = []
        for name, parameter in root.named_parameters():
            parameter.name, parameter._realized = name, True  # onnxscript would rename it
            self._own.append(name)

    def weight_pointers(self) -> dict[str, int]:
        whole = (name for name in self._own if name not in self._held)
        return {name: self._parameters[name].data_ptr() for name in whole}

    def make_weights(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Ask for all that is made of parameters in fewer bits: torch's may go then, before a step
        is bound. Gives why a step is not served, if it is not.

        Args:
            tensors: as for ``bind``, of any size; nothing is written.
        """
        ops = FusedOps(self.target, self._parameters, tensors, self._held)
        try:
            self._root.decode(ops, **{n: t for n, t in tensors.items() if n != "logits"})
        except NotFused as error:
            return str(error)
        return None

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> "FusedBinding":
        """Record and compile the step over these tensors; logits land in ``tensors["logits"]``.

        Raises:
            NotFused: some size or operation is not served.
        """
        batch, queries = tensors["input_ids"].shape
        self._check(tensors, batch, queries)
        vocabulary = FusedOps if batch * queries <= TILE_ROWS else WideOps
        ops = vocabulary(self.target, self._parameters, tensors, self._held)
        inputs = {name: tensor for name, tensor in tensors.items() if name != "logits"}
        results = self._root.decode(ops, **inputs)
        ops.store(results["logits"], tensors["logits"])
        return self._compiled(ops)

    def bind_prompt(self, tensors: Mapping[str, torch.Tensor], filled: int) -> "FusedBinding":
        """``bind`` for tokens [B, Q] of a prompt, behind ``filled`` slots, that give keys and
        values and nothing else.

        Raises:
            NotFused: some size or operation is not served.
        """
        self._check(tensors, 1, 1)  # of any number of tokens
        ops = PromptOps(self.target, self._parameters, tensors, filled, self._held)
        self._root.decode(ops, **tensors)
        ops.trim()
        return self._compiled(ops)

    def _check(self, tensors: Mapping[str, torch.Tensor], batch: int, queries: int) -> None:
        slots, device = tensors["slot_positions"].shape[1], tensors["input_ids"].device
        head_size = self._root.shape.head_size
        if reason := supports(self.target, device, batch, queries, slots, head_size):
            raise NotFused(reason)

    def _compiled(self, ops: FusedOps) -> "FusedBinding":
        return FusedBinding(ops, nvrtc.program(ops.source(), ops.device, self._engine_cache))


class FusedBinding:
    """All launches of one step, ready to run."""

    def __init__(self, ops: FusedOps, program: Program) -> None:
        self._launches = [
            program.prepare(launch) if isinstance(launch, Launch) else launch
            for launch in ops.launches
        ]
        self._keep = ops  # and with it every tensor
        self._device = ops.device

    def run(self) -> None:
        """Queue the step's kernels on torch's current stream."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with torch.cuda.device(self._device):
            for launch in self._launches:
                launch(stream)
