"""Many random `generate` calls through the stock class, the HF loop and the fast loop.

    python -m tests.generation.sweep --examples 2000 --seed 1

Prints each call that differs; fails if one does that does not hang on a near tie.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter

import torch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTGEN_CACHE"] = folder
        return sweep(options.examples, options.seed)


def sweep(examples: int, seed_value: int) -> int:
    """Check ``examples`` random calls; gives the exit status."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.generation.calls import GenerateCall, calls
    from tests.generation.compare import check_call, hangs_on_a_near_tie

    counts: Counter[str] = Counter()
    start = time.monotonic()

    @seed(seed_value)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def look(call: GenerateCall) -> None:
        counts["calls"] += 1
        if differs := check_call(call):
            kind = "near ties" if hangs_on_a_near_tie(call) else "differences"
            counts[kind] += 1
            print(f"{kind}: {call}\n  {differs}", flush=True)
        if counts["calls"] % 100 == 0:
            print(f"{dict(counts)} after {time.monotonic() - start:.0f} s", flush=True)

    look()
    print(dict(counts))
    return 1 if counts["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
