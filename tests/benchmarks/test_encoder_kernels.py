"""What an encoder's launches move and compute, recorded on the CPU."""

from dataclasses import replace

import torch
from transformers import BertConfig

from benchmarks.encoder_kernels import Kind, kinds
from fastgen.engines.fused.encoder import PackedEngine
from fastgen.hf.quantised import Weights
from fastgen.models.bert import Encoder, FastBertModel
from fastgen.target import Target, onnxruntime_cuda

E, F, LAYERS, LENGTHS = 32, 48, 3, [5, 2]


TOKENS = sum(LENGTHS)
TARGET = onnxruntime_cuda("float32")


def kinds_of(target: Target) -> dict[str, Kind]:
    """Of a small encoder, which runs once."""
    sizes = {"hidden_size": E, "intermediate_size": F, "num_hidden_layers": LAYERS}
    config = BertConfig(**sizes, vocab_size=50, num_attention_heads=4)
    parameters = Weights(dict(FastBertModel(config).named_parameters()), {})
    more = ("token_type_ids",)
    engine = PackedEngine(Encoder(config), target, torch.device("cpu"), parameters, False, more)
    binding = engine.bind(TOKENS, len(LENGTHS))
    size = binding.size(TOKENS, len(LENGTHS), max(LENGTHS))
    size.starts.copy_(torch.tensor([0, 5, 7]))
    size.keys.copy_(torch.tensor(LENGTHS))
    with torch.no_grad():
        for launch in binding.launches:
            launch(size)
    return kinds(binding.launches, size, LENGTHS)


def test_weights_of_fewer_bits_are_read_and_written() -> None:
    found = kinds_of(replace(TARGET, weights="fp8"))
    (name,) = (name for name in found if name.startswith("dequantise"))
    numbers, outputs = 4 * E * E + 2 * E * F, 5 * E + F  # of a layer, one launch
    assert len(found[name].runs) == LAYERS and "Fp8" in name
    assert found[name].floor.bytes == (1 + 4) * numbers + 4 * outputs


def test_all_launches_have_a_kind_and_a_floor() -> None:
    found = kinds_of(TARGET)
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
    assert (wide.bytes, wide.flops) == (4 * (TOKENS * (E + F) + E * F + F), 2 * TOKENS * E * F)
    assert numbers["attention<4, 8>"][1].flops == 4 * E * (25 + 4)
    assert numbers["norm_rows<32, 8, 32, true, PLAIN>"][1].bytes == 4 * 3 * TOKENS * E
    assert numbers["activate_rows<GELU_ERF, 8, false>"][1].bytes == 4 * 2 * TOKENS * F
    for kind in found.values():
        kind.runs[0](0)
