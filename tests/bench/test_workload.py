import pytest
import torch

from fastgen.bench import Encoding, Workload, encoder_grid, standard_grid
from fastgen.bench.workload import workload_from


@pytest.mark.parametrize("field", ["batch", "prompt_tokens", "new_tokens", "beams"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        Workload(**{field: 0})


def test_ragged_rows_are_padded_behind_and_the_first_is_full():
    workload = Encoding(batch=6, prompt_tokens=64, ragged=True)
    ids, mask = workload.tokens(vocab_size=20)
    assert ids.shape == mask.shape == (6, 64)
    assert mask.sum(dim=1).tolist() == workload.lengths
    assert workload.lengths[0] == 64
    assert all(8 <= length <= 64 for length in workload.lengths)
    assert len(set(workload.lengths)) > 3
    assert torch.equal(ids != 0, mask != 0)
    assert workload.title == "6 rows of 8 to 64 tokens"


def test_full_rows_have_no_padding():
    ids, mask = Encoding(batch=2, prompt_tokens=5).tokens(vocab_size=20)
    assert mask.all()
    assert (ids > 2).all()
    assert Encoding(batch=2, prompt_tokens=5).lengths == [5, 5]


def test_sizes_of_an_encoding_below_one_are_refused():
    with pytest.raises(ValueError, match="batch=0"):
        Encoding(batch=0)


def test_beam_sampling_is_refused():
    with pytest.raises(ValueError, match="beam sampling"):
        Workload(beams=4, sample=True)


def test_prompts_are_equal_each_time_and_hold_no_special_ids():
    workload = Workload(batch=3, prompt_tokens=50)
    prompts = workload.prompts(vocab_size=20)
    assert prompts.shape == (3, 50)
    assert set(prompts.unique().tolist()) <= set(range(3, 20))
    assert torch.equal(prompts, workload.prompts(vocab_size=20))


def test_end_of_sequence_id_is_outside_of_the_vocabulary():
    assert Workload().generate_kwargs(128)["eos_token_id"] == 128


def test_workload_survives_json():
    for workload in (*standard_grid(), *encoder_grid()):
        assert workload_from(workload.as_dict()) == workload


def test_grid_has_the_rows_of_the_performance_table():
    assert [workload.title for workload in standard_grid()] == [
        "greedy, batch 1, prompt 32, 64 new tokens",
        "greedy, batch 16, prompt 512, 64 new tokens",
        "sampling top-k 50 top-p 0.9, batch 1, prompt 32, 64 new tokens",
        "4 beams, batch 1, prompt 32, 64 new tokens",
        "4 beams, batch 16, prompt 512, 64 new tokens",
    ]
