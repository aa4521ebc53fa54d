import pytest
import torch

from fastgen.bench import Workload, standard_grid


@pytest.mark.parametrize("field", ["batch", "prompt_tokens", "new_tokens", "beams"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        Workload(**{field: 0})


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
    for workload in standard_grid():
        assert Workload(**workload.as_dict()) == workload


def test_grid_has_the_rows_of_the_performance_table():
    assert [workload.title for workload in standard_grid()] == [
        "greedy, batch 1, prompt 32, 64 new tokens",
        "greedy, batch 16, prompt 512, 64 new tokens",
        "sampling top-k 50 top-p 0.9, batch 1, prompt 32, 64 new tokens",
        "4 beams, batch 1, prompt 32, 64 new tokens",
        "4 beams, batch 16, prompt 512, 64 new tokens",
    ]
