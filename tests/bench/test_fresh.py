import pytest
import torch

from fastgen.bench.fresh import Job, _run, measure_fresh
from fastgen.bench.shapes import write_random_checkpoint
from fastgen.bench.workload import Encoding


def test_failure_of_the_process_is_told(tmp_path):
    job = Job("hf", "seq2seq", str(tmp_path), "cpu", "float32", 1, 128, {"new_tokens": 1})
    with pytest.raises(RuntimeError, match=r"hf in a fresh process, exit 1: .*config\.json"):
        measure_fresh(job)


def test_an_encoder_is_loaded_and_called(tmp_path):
    write_random_checkpoint("bert-tiny", tmp_path, dtype=torch.float32, device="cpu")
    workload, threads = Encoding(prompt_tokens=8).as_dict(), torch.get_num_threads()
    found = _run(Job("hf", "encoder", str(tmp_path), "cpu", "float32", threads, 128, workload))
    assert found.load_s > 0
    assert found.peak_bytes > 50e6
