"""OpenVINO by optimum-intel, which cannot be installed beside fastgen: a process of its own."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastgen.bench import openvino_worker
from fastgen.bench.contender import Contender
from fastgen.bench.workload import SEED, Encoding, Workload

PYTHON = "FASTGEN_OPENVINO_PYTHON"

_PRECISIONS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class OpenVINO(Contender):
    """``generate`` and encoders of optimum-intel, on the CPU.

    Its environment's Python is named by ``FASTGEN_OPENVINO_PYTHON``.
    """

    name = "openvino"
    draws_with_torch = False
    eight_bits: ClassVar[bool] = False
    """Whether weights are stored in 8 bits."""
    _worker: "_Worker | None" = None
    _problem = ""

    @property
    def version(self) -> str | None:
        given = os.environ.get(PYTHON)
        if not given or shutil.which(given) is None:
            self._problem = f"{given!r} is no program" if given else "not set"
            return None
        try:
            found: str = self._ask("versions")
        except (OSError, RuntimeError) as error:
            self._problem = str(error)
            return None
        return found

    @property
    def missing(self) -> str:
        return (
            f"{PYTHON}: {self._problem}; it names the Python of an environment that has OpenVINO: "
            "python -m venv ov && ov/bin/pip install 'optimum-intel[openvino]' 'transformers<5.6' "
            f"&& export {PYTHON}=$PWD/ov/bin/python"
        )

    def prepare(self, checkpoint: str, folder: Path) -> str:
        if self.device != "cpu":
            raise ValueError(f"OpenVINO does not run on {self.device}: it is measured on cpu.")
        graphs = str(folder / self.name)
        self._ask(
            "export",
            kind=self.kind,
            checkpoint=checkpoint,
            folder=graphs,
            eight_bits=self.eight_bits,
        )
        return graphs

    def load(self, path: str) -> None:
        threads, precision = torch.get_num_threads(), _PRECISIONS[self.dtype]
        self._ask("load", kind=self.kind, folder=path, precision=precision, threads=threads)

    @property
    def process(self) -> int | None:
        return None if self._worker is None else self._worker.process.pid

    def inputs(self, workload: Any) -> dict[str, Any]:
        if isinstance(workload, Encoding):
            ids, mask = workload.tokens(self.vocab_size)
        else:
            ids = workload.prompts(self.vocab_size)
            mask = torch.ones_like(ids)
        return {"inputs": ids.tolist(), "mask": mask.tolist()}

    def call(self, inputs: dict[str, Any], workload: Any) -> Any:
        generates = isinstance(workload, Workload)
        kwargs = workload.generate_kwargs(self.vocab_size) if generates else None
        self._ask("call", **inputs, kwargs=kwargs, seed=SEED)
        return workload

    def result(self, output: Any) -> Any:
        """Of the last call, which is the one that gave ``output``."""
        found = self._ask("result")
        if isinstance(output, Encoding):
            return torch.tensor(found)
        # Not new are the prompt, or the decoder start token in its place.
        start = output.prompt_tokens if self.kind == "causal" else 1
        return [row[start:] for row in found]

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _ask(self, do: str, **arguments: Any) -> Any:
        if self._worker is None:
            self._worker = _Worker(os.environ[PYTHON])
        return self._worker.ask({"do": do, **arguments})


class OpenVINOInt8(OpenVINO):
    """The same with weights of 8 bits."""

    name = "openvino-int8"
    eight_bits = True


class _Worker:
    """The process, and what is said to it."""

    def __init__(self, python: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 as long as the process
        script = openvino_worker.__file__
        self.process = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """What it answers.

        Raises:
            RuntimeError: the request failed there, or the process ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"OpenVINO's process ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"in OpenVINO's process: {answer['error']}")
        return answer["answer"]

    def _last_words(self) -> str:
        self.process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit {self.process.returncode}"

    def close(self) -> None:
        self.process.communicate()  # closes its stdin, at which it ends
        self._errors.close()
