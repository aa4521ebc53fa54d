import pytest

from fastgen.bench.fresh import Job, measure_fresh


def test_failure_of_the_process_is_told(tmp_path):
    job = Job("hf", str(tmp_path), "cpu", "float32", 1, 128, {"new_tokens": 1})
    with pytest.raises(RuntimeError, match=r"hf in a fresh process, exit 1: .*config\.json"):
        measure_fresh(job)
