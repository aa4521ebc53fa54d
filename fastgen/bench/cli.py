"""The command ``fastgen bench``."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import rich.console

    from fastgen.bench.workload import AnyWorkload


class Device(StrEnum):
    """Where to run."""

    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    """Type of weights and computation."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


_Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="A hub id, a folder, or a shape with random weights such as t5-small@random, "
        "gpt2@random, bart-base@random or bert-base@random.",
    ),
]
_Device = Annotated[Device, typer.Option(help="Where to run.")]
_DType = Annotated[DType, typer.Option(help="Type of weights and computation.")]
_Batch = Annotated[int, typer.Option(min=1, help="Prompts in a call.")]
_PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens in a prompt.")]
_NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate; not of an encoder.")]
_Beams = Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy.")]
_Ragged = Annotated[
    bool,
    typer.Option(
        "--ragged", help="Of an encoder: rows of an eighth of --prompt-tokens to all, padded."
    ),
]
_Sample = Annotated[bool, typer.Option("--sample", help="Sample with top-k 50, top-p 0.9.")]
_Grid = Annotated[
    bool,
    typer.Option(
        "--grid",
        help="The workloads of the performance tables, five of generate and six of encoders, in "
        "place of --batch, --prompt-tokens, --ragged, --beams and --sample.",
    ),
]
_Against = Annotated[
    str,
    typer.Option(
        metavar="PEERS",
        help="Peers, separated by commas: hf-static is of generate, hf-compile of encoders; "
        "openvino and openvino-int8 need FASTGEN_OPENVINO_PYTHON.",
    ),
]
_Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the figures there after each workload."),
]
_Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of every contender.")]
_Repeats = Annotated[int, typer.Option(min=1, help="Timed rounds, at least.")]
_MinSeconds = Annotated[float, typer.Option(min=0, help="Seconds of timed rounds, at least.")]
_Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh/--no-fresh",
        help="Measure load time and peak memory, each contender in a process of its own.",
    ),
]


def bench(
    models: _Models,
    device: _Device = Device.CPU,
    dtype: _DType = DType.FLOAT32,
    batch: _Batch = 1,
    prompt_tokens: _PromptTokens = 32,
    new_tokens: _NewTokens = 64,
    beams: _Beams = 1,
    sample: _Sample = False,
    ragged: _Ragged = False,
    grid: _Grid = False,
    against: _Against = "hf,hf-static,hf-compile,ctranslate2",
    json_file: _Json = None,
    threads: _Threads = None,
    repeats: _Repeats = 5,
    min_seconds: _MinSeconds = 1.0,
    fresh: _Fresh = True,
) -> None:
    """Measure whole calls against stock transformers and other libraries, side by side."""
    import rich.console  # here, so that the other commands do not wait for torch

    from fastgen.bench import run

    def workloads(kind: str) -> "Sequence[AnyWorkload]":
        if grid:
            return _grid(kind, new_tokens)
        return [_single(kind, batch, prompt_tokens, ragged, (new_tokens, beams, sample))]

    _quieten()
    console = rich.console.Console()
    try:
        with _progress(console) as progress:
            report = run(
                models,
                workloads,
                device=device.value,
                dtype=dtype.value,
                peers=[peer for peer in against.split(",") if peer],
                threads=threads,
                json_file=json_file,
                progress=progress,
                repeats=repeats,
                min_seconds=min_seconds,
                fresh=fresh,
            )
    except (ValueError, OSError) as error:  # OSError: transformers finds no such model
        raise typer.BadParameter(str(error)) from error
    report.print(console)
    if report.failures():
        raise typer.Exit(1)


def _quieten() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _grid(kind: str, new_tokens: int) -> "Sequence[AnyWorkload]":
    from fastgen.bench import encoder_grid, standard_grid

    return encoder_grid() if kind == "encoder" else standard_grid(new_tokens)


def _single(
    kind: str, batch: int, tokens: int, ragged: bool, generation: tuple[int, int, bool]
) -> "AnyWorkload":
    """The workload of the options; ``generation`` is new tokens, beams and whether to sample."""
    from fastgen.bench import Encoding, Workload

    if kind == "encoder":
        return Encoding(batch, tokens, ragged)
    if ragged:
        raise ValueError("--ragged: only of encoders; leave it out for a model that generates.")
    return Workload(batch, tokens, *generation)


@contextlib.contextmanager
def _progress(console: "rich.console.Console") -> Iterator[Callable[[str], None]]:
    """A function that says what is being done: in a line that changes, or, where stdout is no
    terminal, in lines on stderr, one for all rounds of a timing."""
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
        return
    last = ""

    def say(doing: str) -> None:
        nonlocal last
        step = doing.partition(", round")[0]
        if step != last:
            typer.echo(f"fastgen bench: {step}", err=True)
        last = step

    yield say
