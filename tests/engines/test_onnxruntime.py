"""The ONNX Runtime engine: which weights it holds a second time on a CPU, and what it refuses."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgen import runtime
from fastgen.engines.onnxruntime import OnnxRuntime, _on_device, _prepacked
from fastgen.errors import EngineError, MissingRuntimeError
from fastgen.file_pages import _told
from fastgen.graphs.graph import Graph
from tests.configs import build_pair

NAMES = ["t5-1.0", "t5-1.1"]


def graph_of(engine: Any) -> Graph:
    graph: Graph = engine.graph
    return graph


def decoder(name: str, from_file: bool = False) -> tuple[Graph, dict[str, torch.nn.Parameter]]:
    """A variant's decoder graph and its parameters, from a file or in memory of their own."""
    model: Any = build_pair(name).fast
    model = model if from_file else copy.deepcopy(model)
    engine = model._current_engine().decoder(False, model.engine_options.min_bucket)
    return graph_of(engine), dict(model.named_parameters(remove_duplicate=False))


def size(parameters: dict[str, torch.nn.Parameter]) -> int:
    return sum({p.data_ptr(): p.nbytes for p in parameters.values()}.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0, 0.05, 0.25, 0.4])
def test_packed_weights_are_the_share_asked_for(name: str, share: float) -> None:
    graph, own = decoder(name)
    packed = _prepacked(graph, own, share)
    left = share * size(own) - sum(own[key].nbytes for key in packed)
    assert 0 <= left < max(own[key].nbytes for key in graph.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_matrices_of_short_rows_are_packed_first(name: str) -> None:
    graph, own = decoder(name)
    order = list(_prepacked(graph, own, 0.999))
    assert len(order) == len(set(order))
    lengths = [own[key].shape[1] for key in order]
    assert lengths == sorted(lengths)
    # all that is multiplied by: no table of embeddings, no norm, no bias
    parts = {part for key in order for part in key.split(".")}
    assert {"q", "k", "v", "o", "wo", "lm_head"} <= parts
    assert not parts & {"embed_tokens", "layer_norm", "relative_attention_bias"}


def test_graphs_that_run_once_a_call_are_packed_only_with_all_weights() -> None:
    model: Any = copy.deepcopy(build_pair("t5-1.1").fast)
    graph = graph_of(model.encoder._current_engine().engine)
    own = dict(model.encoder.named_parameters())
    assert _prepacked(graph, own, 0.999) == ()
    assert _prepacked(graph, own, 1) == graph.parameters


def test_vectors_are_no_inputs_and_are_read_where_they_lie() -> None:
    model: Any = copy.deepcopy(build_pair("t5-1.1").fast)
    encoder, own = model.encoder._current_engine(), dict(model.encoder.named_parameters())
    assert {own[name].ndim for name in encoder.engine._inputs} == {2}
    ids = torch.arange(3, 9)[None]
    before = encoder.run(ids, None)
    own["final_layer_norm.weight"].data.mul_(2)
    assert torch.equal(encoder.run(ids, None), 2 * before)


@pytest.mark.skipif(not _told(), reason="the kernel does not tell of writes to pages")
def test_matrices_that_lie_in_a_file_are_packed_whatever_the_share() -> None:
    graph, own = decoder("t5-1.1", from_file=True)
    wanted = {*_prepacked(*decoder("t5-1.1"), 0.999)}
    assert {*_prepacked(graph, own, 0.01)} == wanted
    assert _prepacked(graph, own, 0) == ()
    model: Any = build_pair("t5-1.1").fast
    encoder = model.encoder._current_engine()
    own = dict(model.encoder.named_parameters())
    packed = _prepacked(graph_of(encoder.engine), own, 0.01)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in packed} == {
        *("q", "k", "v", "o", "wi_0", "wi_1", "wo")
    }
    with_states = encoder._states()
    assert _prepacked(graph_of(with_states), own, 0.01) == ()


def test_a_build_without_cuda_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OnnxRuntime("onnxruntime")
    monkeypatch.setattr(runtime, "cuda_build_problem", lambda: "a CPU build: run this")
    backend.check(torch.device("cpu"))
    with pytest.raises(MissingRuntimeError, match="a CPU build: run this"):
        backend.check(torch.device("cuda"))


CUDA, CPU = (
    SimpleNamespace(get_providers=lambda name=name: [name])
    for name in ("CUDAExecutionProvider", "CPUExecutionProvider")
)


def fails() -> Any:
    raise RuntimeError("no implementation of Where")


@pytest.mark.parametrize("compiled", [lambda: CPU, fails])
def test_a_session_that_fell_back_to_the_cpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, compiled: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(runtime, "cuda_provider_problem", lambda: "libraries: run this")
    with pytest.raises(MissingRuntimeError, match="libraries: run this"):
        _on_device(compiled, torch.device("cuda"))


def test_other_failures_of_a_session_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(runtime, "cuda_provider_problem", lambda: None)
    for device in ("cpu", "cuda"):
        with pytest.raises(EngineError, match="no implementation of Where"):
            _on_device(fails, torch.device(device))
    assert _on_device(lambda: CPU, torch.device("cpu")) is CPU
    assert _on_device(lambda: CUDA, torch.device("cuda")) is CUDA
