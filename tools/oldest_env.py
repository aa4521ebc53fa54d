"""Puts the oldest transformers that fastgen supports beside an environment: FOLDER, for PYTHONPATH.

`.venv/bin/python tools/oldest_env.py FOLDER`: the version is the first of `MET` in
fastgen/hf/contract.py. What it needs goes there too, but for torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

CONTRACT = Path(__file__).resolve().parent.parent / "fastgen" / "hf" / "contract.py"


def oldest() -> str:
    """The first version of `MET`, read from the source: importing it would import transformers."""
    for node in ast.parse(CONTRACT.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MET":
            return str(ast.literal_eval(node.value)[0])
    raise SystemExit(f"{CONTRACT}: there is no MET")


def main() -> None:
    """Installs into the folder named on the command line."""
    folder = Path(sys.argv[1])
    if (folder / f"transformers-{oldest()}.dist-info").exists():
        return
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    subprocess.run([*install, "--upgrade", f"transformers=={oldest()}"], check=True)


if __name__ == "__main__":
    main()
