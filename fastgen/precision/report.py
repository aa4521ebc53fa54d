"""What ``find_unstable`` found, as the command line prints it."""

import math

from rich.console import Console
from rich.table import Column, Table

from fastgen.precision.find import Errors, Kept, Precision


def show(precision: Precision, console: Console | None = None) -> None:
    """Print the table of what is kept in float32 and why, and what that is worth."""
    # No markup: names may hold brackets
    console = console or Console(markup=False, highlight=False)
    if precision.kept:
        console.print(_table(precision.kept))
    console.print(_summary(precision), soft_wrap=True)
    for problem in precision.problems:
        console.print(f"Not for float16: {problem}.", style="red", soft_wrap=True)
    if precision.problems:
        console.print("Load this model in bfloat16 or float32.", style="red")


def _table(kept: tuple[Kept, ...]) -> Table:
    table = Table(
        Column("kept in float32", overflow="fold"),
        "kind",
        Column("largest", justify="right"),
        Column("loss in float16", justify="right"),
        "why",
    )
    for row in kept:
        table.add_row(row.name, row.kind, f"{row.largest:.3g}", _percent(row.loss), row.reason)
    return table


def _summary(precision: Precision) -> str:
    errors: Errors = precision.errors
    return (
        f"{len(precision.kept)} of {precision.operations} operations are kept in float32, with "
        f"{precision.casts} casts. Error against float32: {_percent(errors.found)}. With all in "
        f"float16: {_percent(errors.naive)}. By the rules for models that nobody looked at: "
        f"{_percent(errors.rules)}."
    )


def _percent(part: float) -> str:
    return f"{part:.2%}" if math.isfinite(part) else "overflows"
