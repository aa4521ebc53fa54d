"""Makes the project's virtual environment: `python3 tools/setup_env.py FOLDER`.

With an NVIDIA GPU it installs the `cuda` extra, else the `cpu` extra. Without a GPU the CUDA build
of torch is several GB of no use, so a torch that pip resolves to a CPU build is installed first.
Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What to ask pip for, in this order, on a machine without a GPU. The first is the version that
#: the tests are developed with; plain "torch" is a CPU build on macOS and wherever pip was pointed
#: to PyTorch's index of CPU builds.
CPU_TORCH_CANDIDATES = ("torch==2.13.0", "torch")

NO_CPU_TORCH = """\
setup: pip knows no CPU build of torch here, so the default build follows: several GB of CUDA
setup: libraries that this machine cannot use. To avoid them, stop this (Ctrl-C), point pip to
setup: PyTorch's index of CPU builds (pytorch.org > Get started > Compute platform: CPU), e.g. with
setup: the environment variable PIP_EXTRA_INDEX_URL, and run the same command again."""


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver lists at least one GPU."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return found.returncode == 0 and "GPU" in found.stdout


def is_cpu_build(python: Path, requirement: str) -> bool:
    """Whether pip would resolve `requirement` without any CUDA library (nothing is installed)."""
    command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", requirement]
    report = subprocess.run(command, capture_output=True, text=True, check=False)
    if report.returncode != 0:
        return False
    # Whatever warnings pip prints go to stderr; stdout is the report.
    names = [item["metadata"]["name"].lower() for item in json.loads(report.stdout)["install"]]
    return not any(name.startswith(("nvidia-", "cuda-")) for name in names)


def main() -> None:
    """Creates the folder named on the command line (default `.venv`) and installs fastgen in it."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv")
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = [python, "-m", "pip", "install"]
    extra = "cuda" if has_nvidia_gpu() else "cpu"
    print(f"setup: {folder} with the extras [{extra},dev]", flush=True)
    if extra == "cpu":
        torch = next((c for c in CPU_TORCH_CANDIDATES if is_cpu_build(python, c)), None)
        if torch is None:
            print(NO_CPU_TORCH, file=sys.stderr, flush=True)
        else:
            subprocess.run([*install, torch], check=True)
    subprocess.run([*install, "-e", f"{ROOT}[{extra},dev]"], check=True)


if __name__ == "__main__":
    main()
