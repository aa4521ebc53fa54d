"""The ONNX Runtime engine: which weights it holds a second time on a CPU."""

from typing import Any

import pytest
import torch

from fastgen.engines.onnxruntime import _prepacked
from fastgen.graph import Graph
from tests.configs import build_pair

NAMES = ["t5-1.0", "t5-1.1"]


def graph_of(engine: Any) -> Graph:
    graph: Graph = engine.graph
    return graph


def decoder(name: str) -> tuple[Graph, dict[str, torch.nn.Parameter]]:
    """A variant's decoder graph and its parameters."""
    model: Any = build_pair(name).fast
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
    model: Any = build_pair("t5-1.1").fast
    graph = graph_of(model.encoder._current_engine())
    own = dict(model.encoder.named_parameters())
    assert _prepacked(graph, own, 0.999) == ()
    assert _prepacked(graph, own, 1) == graph.parameters
