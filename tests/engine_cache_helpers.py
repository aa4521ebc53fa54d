"""What the tests of the engine cache share."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fastgen.engine_cache import Artifact

KEY = {"graph": "sha", "dtype": "float16", "shape": [1, 2], "backend": {"version": "1.0"}}
ARTIFACT = Artifact(b"compiled engine" * 20, {"inputs": {"x": ["batch", 4]}, "scale": 0.5})


class Builder:
    """A build function that counts its calls."""

    def __init__(self, artifact: Artifact = ARTIFACT, error: Exception | None = None) -> None:
        self.artifact, self.error, self.calls = artifact, error, 0

    def __call__(self) -> Artifact:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.artifact


def run_python(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the awaited event never came"
        time.sleep(0.01)
