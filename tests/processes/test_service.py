"""Forked workers: the example's checks, each in a process of its own that may hang or die."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(name: str) -> str:
    """What the check printed; it must have found nothing."""
    command = [sys.executable, "-m", "examples.service.check", name]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_forked_children_run_models_and_end() -> None:
    out = check("forks")
    assert "fork, 2 threads, generate, parent cold: ended" in out
    assert "multiprocessing, pool of 2: same tokens" in out


def test_gunicorn_workers_serve_and_end() -> None:
    pytest.importorskip("gunicorn")
    assert "gunicorn: {'AO1 L TH AW0'}, ended with 0" in check("gunicorn")
