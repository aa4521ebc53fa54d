"""What the two sides of a model share on a GPU, as far as a CPU can tell."""

import pytest
import torch

from fastgen.execution import capturing
from fastgen.execution.capturing import host_flags

GPU = torch.device("cuda", 0)


def test_flags_on_the_host_serve_the_next_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory is not given back to torch, which would record an event behind it."""
    monkeypatch.setattr(capturing, "_idle_flags", {})
    monkeypatch.setattr(torch, "ones", lambda count, dtype, pin_memory: torch.empty(count).bool())

    class Owner:
        pass

    owner, other = Owner(), Owner()
    first = host_flags(owner, 3, GPU)
    assert host_flags(other, 3, GPU) is not first
    del owner
    assert host_flags(other, 4, GPU) is not first
    assert host_flags(other, 3, GPU) is first
