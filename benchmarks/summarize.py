"""Turn the JSON files of ``fastgen bench`` into Markdown tables and a latency plot.

    python benchmarks/summarize.py results/*.json [--plot latency.svg]

The plot needs matplotlib; the tables need nothing beside fastgen itself.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fastgen.bench.environment import describe
from fastgen.bench.session import PEERS
from fastgen.bench.workload import AnyWorkload, workload_from

Record = dict[str, Any]
CONTENDERS = ("fastgen", *PEERS)
Row = tuple[str, str, str, AnyWorkload]
"""Model, device, dtype, workload: what one line of a table, or one group of bars, is about."""


def read(files: list[Path]) -> list[Record]:
    """All records of all files.

    Raises:
        ValueError: a file is not what ``fastgen bench --json`` writes.
    """
    records: list[Record] = []
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not (isinstance(content, list) and all("ms_per_token" in item for item in content)):
            raise ValueError(f"{file}: not a file that `fastgen bench --json` writes.")
        records += content
    return records


def rows(records: list[Record]) -> dict[Row, dict[str, Record]]:
    """Records by row, then by contender; of a row measured twice, the later one."""
    grouped: dict[Row, dict[str, Record]] = {}
    for record in records:
        workload = workload_from(record["workload"])
        row = (record["model"], record["device"], record["dtype"], workload)
        grouped.setdefault(row, {})[record["name"]] = record
    return grouped


def speed_table(grouped: dict[Row, dict[str, Record]]) -> str:
    """Markdown: milliseconds per token, or per call of an encoder, and how many times slower than
    fastgen each peer is."""
    names = [name for name in CONTENDERS if any(name in found for found in grouped.values())]
    lines = [_line(["model", "dtype", "workload", *names]), _line(["---"] * (3 + len(names)))]
    for (model, device, dtype, workload), found in grouped.items():
        cells = [_milliseconds(found.get(name)) for name in names]
        lines.append(_line([model, f"{dtype}, {device}", workload.title, *cells]))
    return "\n".join(lines)


def cost_table(grouped: dict[Row, dict[str, Record]]) -> str:
    """Markdown: time to first token, load time and peak memory where they were measured."""
    heading = ["model", "workload", "contender", "first token ms", "load s", "peak MiB"]
    heading += ["share of floor", "agreement"]
    lines = [_line(heading), _line(["---"] * len(heading))]
    for (model, _, _, workload), found in grouped.items():
        for name, record in found.items():
            if _time(record) is None:
                continue
            peak = record["peak_bytes"]
            costs = [
                _number(record["ttft_ms"], 2),
                _number(record["load_s"], 1),
                _number(peak and peak / 2**20, 0),
                f"{share:.1%}" if (share := record.get("share_of_floor")) else "-",
            ]
            lines.append(_line([model, workload.title, name, *costs, _agreement(record)]))
    return "\n".join(lines)


def footnotes(records: list[Record]) -> str:
    """Where the figures were taken, and why some are missing."""
    places = {describe(record["environment"]) for record in records}
    reasons = {f"{record['name']}: {record['reason']}" for record in records if record["reason"]}
    return "\n".join(f"- {note}" for note in (*sorted(places), *sorted(reasons)))


def plot(grouped: dict[Row, dict[str, Record]], file: Path) -> None:
    """Horizontal bars of ms per token, or per call, one panel for each workload."""
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(row[3] for row in grouped))
    names = [name for name in CONTENDERS if any(name in found for found in grouped.values())]
    height = 1 + 0.18 * len(names) * len({row[:3] for row in grouped})  # inches
    figure, axes = pyplot.subplots(
        len(workloads), figsize=(8, height * len(workloads)), squeeze=False, layout="constrained"
    )
    for axis, workload in zip(axes[:, 0], workloads, strict=True):
        panel = {row: found for row, found in grouped.items() if row[3] == workload}
        for index, name in enumerate(names):
            figures = [_time(found.get(name)) for found in panel.values()]
            bars = [(at, value) for at, value in enumerate(figures) if value is not None]
            height = 0.8 / len(names)
            places = [at + index * height for at, _ in bars]
            drawn = axis.barh(
                places, [value for _, value in bars], height, color=f"C{index}", label=name
            )
            axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize="small")
        middle = 0.4 - 0.4 / len(names)
        labels = [f"{model}\n{dtype}, {device}" for model, device, dtype, _ in panel]
        axis.set_yticks([at + middle for at in range(len(panel))], labels)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_title(workload.title, loc="left", fontsize="medium")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(names))
    axes[-1, 0].set_xlabel("ms per token, or per call of an encoder (lower is better)")
    figure.savefig(file)


def _time(record: Record | None) -> float | None:
    """Milliseconds per token, or per call of an encoder."""
    if record is None:
        return None
    per_call = record.get("ms_per_call")  # of generate too: not in files of older versions
    return per_call if record["ms_per_token"] is None else record["ms_per_token"]


def _milliseconds(record: Record | None) -> str:
    time = _time(record)
    if record is None or time is None:
        return "-"
    ratio = record.get("ratio")
    return f"{time:.3f}" + (f" ({ratio:.1f}x)" if ratio else "")


def _agreement(record: Record) -> str:
    differences = record["agreement"]
    if differences is None:
        return "-"
    if isinstance(differences, dict):
        return f"within {differences['largest']:.1e}"
    same = differences.count(None)
    return "equal" if same == len(differences) else f"{same} of {len(differences)} rows"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and a plot from fastgen bench's JSON.")
    parser.add_argument("files", nargs="+", type=Path, help="written by fastgen bench --json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw ms per token there")
    arguments = parser.parse_args()
    records = read(arguments.files)
    grouped = rows(records)
    print(speed_table(grouped), cost_table(grouped), footnotes(records), sep="\n\n")
    if arguments.plot:
        plot(grouped, arguments.plot)


if __name__ == "__main__":
    main()
