"""Fork a process that has run a model, in all the ways that services do, and see every child end.

python -m examples.service.check [forks | gunicorn]
"""

import argparse
import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

from examples.pronounce.inference import CHECKPOINT, generate_tokens, load

WORDS = ["although", "colonel", "zoology", "midnight"]
LIMIT_S = 120  # what hangs, hangs for ever

_models: dict[int, Any] = {}
_stock_tokens: list[list[int]] = []


def _generate(threads: int) -> None:
    if generate_tokens(_models[threads], WORDS) != _stock_tokens:
        raise SystemExit("other tokens than the stock model's")
    torch.ones(3000, 3000).sum()  # large enough for OpenMP's threads, which a fork leaves behind


def _load(threads: int) -> None:
    model = _models[threads]
    model.load_state_dict(model.state_dict())


#: What children do with the model of their parent before they end.
ACTIONS: dict[str, Callable[[int], Any]] = {
    "generate": _generate,
    "del": _models.__delitem__,
    "invalidate_engine": lambda threads: _models[threads].invalidate_engine(),
    "load_state_dict": _load,
    "nothing": lambda threads: None,
}


def forked(actions: list[str], threads: int) -> dict[str, str]:
    """Do each action in a child of its own, that then ends as programs do; how each has ended."""
    children = {}
    for action in actions:
        sys.stdout.flush()
        children[action] = os.fork()
        if not children[action]:
            ACTIONS[action](threads)
            sys.exit()  # and with it the whole end of the interpreter
    return {action: _end(child) for action, child in children.items()}


def _end(child: int) -> str:
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return "ended" if code == 0 else f"ended with {code}"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"still there after {LIMIT_S} s"


def _tokens_of(word: str) -> list[int]:
    return generate_tokens(_models[2], [word])[0]


def check_forks() -> bool:
    """With 1 and 2 threads, before and after the parent's first call, and a pool's workers."""
    torch.set_num_threads(2)
    _stock_tokens.extend(generate_tokens(load(CHECKPOINT, fast=False), WORDS))
    fine = True
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model: Any = load(CHECKPOINT, fast=True)
        model.engine_options = {"intra_op_threads": threads}
        _models[threads] = model
        ends = {"generate, parent cold": forked(["generate"], threads)["generate"]}
        _generate(threads)
        ends |= forked(list(ACTIONS), threads)
        _generate(threads)
        for action, end in ends.items():
            print(f"fork, {threads} threads, {action}: {end}")
        fine &= set(ends.values()) == {"ended"}
    with multiprocessing.get_context("fork").Pool(2) as pool:
        same = pool.map(_tokens_of, WORDS, chunksize=1) == _stock_tokens
        pool.close()
        pool.join()
    print(f"multiprocessing, pool of 2: {'same tokens' if same else 'OTHER TOKENS'}")
    return fine and same


def check_gunicorn() -> bool:
    """Workers forked from a warmed parent, each of which ends after two requests."""
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2"]
    command += ["--max-requests", "2", "--timeout", "60", "--bind", "127.0.0.1:0"]
    server = subprocess.Popen(
        [*command, "examples.service.app:app"],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    log: list[str] = []
    for line in server.stderr:
        log.append(line)
        if found := re.search(r"Listening at: (http://\S+)", line):
            break
    answers = set()
    if found:
        for _ in range(8):
            with urlopen(f"{found[1]}/?word=although", timeout=LIMIT_S) as answer:
                answers.add(answer.read().decode())
    server.send_signal(signal.SIGTERM)
    log += server.communicate(timeout=LIMIT_S)[1].splitlines(keepends=True)
    killed = [line for line in log if re.search("SIG(ABRT|KILL|SEGV)|TIMEOUT|Error", line)]
    print(f"gunicorn: {answers or 'no answer'}, ended with {server.returncode}", *killed)
    return len(answers) == 1 and not killed and server.returncode == 0


def main() -> int:
    """Both checks, or the one named; 1 if something hangs, dies or gives other tokens."""
    parser = argparse.ArgumentParser(description="Fork a process that has run a model.")
    parser.add_argument("check", nargs="?", choices=["forks", "gunicorn"])
    only = parser.parse_args().check
    fine = True
    if only != "gunicorn":
        fine &= check_forks()
    if only == "gunicorn" or (only is None and importlib.util.find_spec("gunicorn")):
        fine &= check_gunicorn()
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
