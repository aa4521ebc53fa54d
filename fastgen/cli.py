"""The command line: ``fastgen compile | precision | bench | cache | doctor``.

Whatever needs torch is imported inside its command, so that ``fastgen cache list`` starts fast.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from fastgen import __version__, registry
from fastgen.bench.cli import bench
from fastgen.engine_cache import EngineCache
from fastgen.errors import FastgenError
from fastgen.options import EngineOptions

app = typer.Typer(no_args_is_help=True, help="Hugging Face text generation, many times faster.")
cache_app = typer.Typer(no_args_is_help=True, help="The engine cache: compiled engines on disk.")
app.add_typer(cache_app, name="cache")
app.command("bench")(bench)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastgen {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say which it is."),
    ] = False,
) -> None:
    """Hugging Face text generation, many times faster."""


class Device(StrEnum):
    """Where a model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    """The dtype of a model's weights; ``auto`` takes the checkpoint's."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@contextlib.contextmanager
def _errors_as_text(*expected: type[Exception]) -> Iterator[None]:
    """End the command with the message of an expected error instead of its traceback."""
    kinds: tuple[type[Exception], ...] = (FastgenError, *expected)
    try:
        yield
    except kinds as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def _engine_cache() -> EngineCache:
    with _errors_as_text():
        return EngineCache(EngineOptions.resolve().cache_dir)


@app.command()
def doctor() -> None:
    """Say what is installed, which engine is picked on this machine, and why not the others."""
    from fastgen.doctor import report

    with _errors_as_text():
        if not report():
            raise typer.Exit(1)


_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, folder, or a shape with random weights such as t5-small@random.",
    ),
]
_Device = Annotated[Device, typer.Option(help="auto: the GPU, if torch sees one.")]


def _seen(device: Device) -> Device:
    """The device asked for, if torch sees it.

    Raises:
        FastgenError: it sees no GPU, and one was asked for.
    """
    import torch

    sees = torch.cuda.is_available()
    if device is Device.CUDA and not sees:
        raise FastgenError(
            "--device cuda: torch sees no CUDA device here (see `fastgen doctor`); "
            "use --device cpu."
        )
    if device is Device.AUTO:
        return Device.CUDA if sees else Device.CPU
    return device


@app.command("compile")
def compile_model(
    model: _Model,
    device: _Device = Device.AUTO,
    dtype: Annotated[DType, typer.Option(help="auto: the checkpoint's.")] = DType.AUTO,
) -> None:
    """Build the engines of MODEL and store them in the engine cache."""
    with _errors_as_text():
        device = _seen(device)
    # OSError, ValueError: transformers' errors for what it cannot load
    with _errors_as_text(OSError, ValueError), _checkpoint(model) as checkpoint:
        fast = _fast_class(checkpoint).from_pretrained(checkpoint, dtype=dtype.value)
    with _errors_as_text():
        cache = EngineCache(fast.engine_options.cache_dir)
        before = {entry.fingerprint for entry in cache.entries()}
        fast.to(device.value).compile_engine()
        new = [entry for entry in cache.entries() if entry.fingerprint not in before]
    where = cache.folder if fast.engine_options.disk_cache else "memory only (disk_cache=False)"
    typer.echo(f"{model} is compiled for {device} in {fast.dtype}: {where}")
    for entry in new:
        typer.echo(f"  new: {entry.title} ({entry.size / 1e6:.2f} MB)")


@app.command()
def precision(
    model: _Model,
    device: _Device = Device.AUTO,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Lines to look at MODEL with, beside random tokens."
        ),
    ] = None,
    bound: Annotated[
        float, typer.Option(help="Relative error that an operation may have in float16.")
    ] = 0.01,
    headroom: Annotated[
        float, typer.Option(help="How many times larger values may get before they overflow.")
    ] = 4.0,
) -> None:
    """Find what MODEL must keep in float32 when it runs in float16, and remember it."""
    from fastgen.precision import find_unstable
    from fastgen.precision.report import show
    from fastgen.precision.text import batches

    with _errors_as_text():
        device = _seen(device)
    # OSError, ValueError: transformers' errors for what it cannot load
    with _errors_as_text(OSError, ValueError), _checkpoint(model) as checkpoint:
        fast = _fast_class(checkpoint).from_pretrained(checkpoint, dtype="auto").to(device.value)
        inputs = [] if text is None else batches(checkpoint, fast, text.read_text().splitlines())
        found = find_unstable(fast, inputs, bound=bound, headroom=headroom)
    show(found)
    if fast.engine_options.disk_cache:
        typer.echo(
            "Remembered by its weights: they run so whenever they are loaded in float16 "
            f"(engine cache {EngineCache(fast.engine_options.cache_dir).folder})."
        )
    if found.problems:
        raise typer.Exit(1)


def _fast_class(checkpoint: str) -> Any:
    """The Fast class of the class that a checkpoint was saved from; where there is none, the one
    that stands for its family."""
    from transformers import AutoConfig

    import fastgen

    config = AutoConfig.from_pretrained(checkpoint)
    saved = (f"Fast{name.removeprefix('Fast')}" for name in config.architectures or ())
    if (name := next((name for name in saved if name in registry.HOMES), None)) is None:
        family = registry.FAMILIES.get(config.model_type)
        name = family.class_name() if family else "FastAutoModel"  # whose error names them all
    return getattr(fastgen, name)


@contextlib.contextmanager
def _checkpoint(model: str) -> Iterator[str]:
    """Where to load a model from: a shape with random weights (in fp32) is written for it."""
    import torch

    from fastgen.bench.shapes import SUFFIX, write_random_checkpoint

    if not model.endswith(SUFFIX):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="fastgen-") as folder:
        name = model.removesuffix(SUFFIX)
        write_random_checkpoint(name, Path(folder), dtype=torch.float32, device="cpu")
        yield folder


@cache_app.command("list")
def list_entries() -> None:
    """List the compiled engines, the last used first."""
    cache = _engine_cache()
    entries = cache.entries()
    table = Table("fingerprint", Column("engine", overflow="fold"), "MB", "last used (UTC)")
    for entry in entries:
        used = f"{entry.last_used:%Y-%m-%d %H:%M}"
        table.add_row(entry.fingerprint[:12], entry.title, f"{entry.size / 1e6:.2f}", used)
    if entries:
        Console(markup=False, highlight=False).print(table)
    total = sum(entry.size for entry in entries) / 1e6
    typer.echo(f"{len(entries)} compiled, {total:.2f} MB in {cache.folder}")


@cache_app.command()
def verify() -> None:
    """Check every compiled engine; exit with 1 if one is damaged."""
    cache = _engine_cache()
    problems = cache.verify()
    for problem in problems:
        typer.echo(f"{problem.fingerprint[:12]}: {problem.reason}")
    if problems:
        typer.echo(
            f"{len(problems)} damaged in {cache.folder}. They are built again when needed; "
            "`fastgen cache prune` removes them now."
        )
        raise typer.Exit(1)
    typer.echo(f"{len(cache.entries())} compiled in {cache.folder}, all good")


@cache_app.command()
def prune(
    older_than: Annotated[
        float | None,
        typer.Option(min=0, max=36_500, metavar="DAYS", help="Not used for so many days."),
    ] = None,
    max_mb: Annotated[
        float | None, typer.Option(min=0, metavar="MB", help="Keep at most so much, by last use.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every engine.")] = False,
) -> None:
    """Remove damaged engines, and those the options name."""
    cache = _engine_cache()
    age = None if older_than is None else timedelta(days=older_than)
    max_bytes = 0 if everything else None if max_mb is None else int(max_mb * 1e6)
    pruned = cache.prune(older_than=age, max_bytes=max_bytes)
    freed = pruned.freed_bytes / 1e6
    typer.echo(f"{len(pruned.removed)} removed from {cache.folder}, {freed:.2f} MB freed")
    if pruned.skipped:
        names = ", ".join(name[:12] for name in pruned.skipped)
        typer.echo(f"{len(pruned.skipped)} in use or not removable: {names}", err=True)
        raise typer.Exit(1)
