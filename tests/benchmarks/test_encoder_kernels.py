"""What an encoder's launches move and compute, recorded on the CPU."""

import torch
from transformers import BertConfig

from benchmarks.encoder_kernels import kinds
from fastgen.engines.fused.encoder import PackedEngine
from fastgen.models.bert import Encoder, FastBertModel
from fastgen.target import onnxruntime_cuda

E, F, LAYERS, LENGTHS = 32, 48, 3, [5, 2]


def test_all_launches_have_a_kind_and_a_floor() -> None:
    sizes = {"hidden_size": E, "intermediate_size": F, "num_hidden_layers": LAYERS}
    config = BertConfig(**sizes, vocab_size=50, num_attention_heads=4)
    parameters = dict(FastBertModel(config).named_parameters())
    target, more = onnxruntime_cuda("float32"), ("token_type_ids",)
    engine = PackedEngine(Encoder(config), target, torch.device("cpu"), parameters, False, more)
    tokens = sum(LENGTHS)
    binding = engine.bind(tokens, len(LENGTHS))
    size = binding.size(tokens, len(LENGTHS), max(LENGTHS))
    size.starts.copy_(torch.tensor([0, 5, 7]))
    size.keys.copy_(torch.tensor(LENGTHS))
    for launch in binding.launches:
        launch(size)
    found = kinds(binding.launches, size, LENGTHS)
    numbers = {name: (len(kind.runs), kind.floor) for name, kind in found.items()}
    assert {name: count for name, (count, _) in numbers.items()} == {
        "cuBLAS<32, 32, STORE>": 4 * LAYERS,
        "attention<4, 8>": LAYERS,
        "norm_rows<32, 8, 32, true, PLAIN>": 2 * LAYERS,
        "cuBLAS<32, 48, STORE>": LAYERS,
        "activate_rows<GELU_ERF, 8, false>": LAYERS,
        "cuBLAS<48, 32, STORE>": LAYERS,
    }
    wide = numbers["cuBLAS<32, 48, STORE>"][1]
    assert (wide.bytes, wide.flops) == (4 * (tokens * (E + F) + E * F + F), 2 * tokens * E * F)
    assert numbers["attention<4, 8>"][1].flops == 4 * E * (25 + 4)
    assert numbers["norm_rows<32, 8, 32, true, PLAIN>"][1].bytes == 4 * 3 * tokens * E
    assert numbers["activate_rows<GELU_ERF, 8, false>"][1].bytes == 4 * 2 * tokens * F
    for kind in found.values():
        kind.runs[0](0)
