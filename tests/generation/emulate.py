"""The paths that only a GPU takes, run on the CPU: captured graphs, and a host that runs ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from fastgen import cuda_graph
from fastgen.capturable import RefuseDraws
from fastgen.execution.capturing import Capturing
from fastgen.execution.decoder import Decoder
from fastgen.generation.loop import RUN_AHEAD, Loop


class EagerGraph:
    """In place of ``cuda_graph.CapturedGraph``: the runs before a capture, then plain calls."""

    def __init__(
        self,
        function: Callable[[], None],
        device: torch.device,
        undo: Callable[[], None],
        pool: None,
    ) -> None:
        for _ in range(2):
            with RefuseDraws():  # other threads draw from the same generator
                function()
            undo()
        self.replay = function


def _restorer(tensors: list[torch.Tensor], device: torch.device) -> Callable[[], None]:
    copies = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)

    return restore


def _wait_late(self: Any) -> bool:
    """As ``Loop._wait`` on a GPU: the host sees what was true RUN_AHEAD tokens ago."""
    seen = self.__dict__.setdefault("_seen", deque())
    seen.append(self.state.seen.clone())
    if len(seen) <= RUN_AHEAD:
        return False
    self.state.seen.copy_(seen.popleft())
    return True


@contextmanager
def gpu_paths(run_ahead: bool = False) -> Iterator[list[Any]]:
    """Decode as on a GPU; gives the keys of the steps that were captured."""
    keys: list[Any] = []
    step_with = Decoder.step_with

    def spy(self: Decoder, bucket: Any, key: Any, make_after: Any, mutable: Any) -> Any:
        keys.append(key)
        return step_with(self, bucket, key, make_after, mutable)

    with ExitStack() as stack:
        for patch in (
            mock.patch.object(Capturing, "captures", property(lambda self: True)),
            mock.patch.object(Decoder, "step_with", spy),
            mock.patch.object(cuda_graph, "CapturedGraph", EagerGraph),
            mock.patch.object(cuda_graph, "GraphPool", lambda device: None),
            mock.patch.object(cuda_graph, "restorer", _restorer),
        ):
            stack.enter_context(patch)
        if run_ahead:
            stack.enter_context(mock.patch.object(Loop, "_wait", _wait_late))
        yield keys
