"""``fastgen doctor``: what is installed, which engine is picked on this machine, and why."""

import os
import platform
import tempfile
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from fastgen import __version__, registry, runtime
from fastgen.engine_cache import EngineCache
from fastgen.errors import FastgenError, MissingRuntimeError
from fastgen.options import EngineOptions

ENGINES = ("onnxruntime", "torch")
#: On a GPU, and only where the options ask for one: name, and the package whose version matters.
ON_REQUEST = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
    "onnxruntime-tensorrt": "onnxruntime-gpu",
}


@dataclass(frozen=True)
class EngineChoice:
    """An engine on a device ("cuda" or "cpu"): whether it can run here, and why (not)."""

    name: str
    device: str
    available: bool
    reason: str
    raises: bool = False
    """A model that should get it raises MissingRuntimeError, and torch does not step in."""

    @property
    def in_line(self) -> bool:
        """Whether models on the device meet it, be it by its error."""
        return self.available or self.raises


def choices(options: EngineOptions | None = None) -> list[EngineChoice]:
    """Every engine on every device, best first; for a model on a device, the first available.

    Args:
        options: what they rule out is not available; None takes the environment's.

    Raises:
        OptionError: the environment holds an option that does not exist.
    """
    options = EngineOptions.resolve() if options is None else options
    found = []
    for device in ("cuda", "cpu"):
        problem = _torch_problem() or (_cuda_problem() if device == "cuda" else None)
        on_request = tuple(ON_REQUEST) if device == "cuda" else ()
        if problem:
            names = ENGINES + on_request
            found += [EngineChoice(name, device, False, problem) for name in names]
            continue
        others = [_choice_on_request(name) for name in on_request]
        asked = [choice for choice in others if choice.name == options.backend]
        engines = [*asked, _onnxruntime_choice(options, device)]
        found += [*engines, _torch_choice(options, device, blocked=engines[0].raises)]
        found += [choice for choice in others if choice not in asked]
    return found


def picked(device: str, candidates: list[EngineChoice]) -> EngineChoice | None:
    """The engine that a model on ``device`` ("cuda" or "cpu") gets; None if none can run."""
    fitting = (choice for choice in candidates if choice.device == device and choice.available)
    return next(fitting, None)


def report() -> bool:
    """Print the whole diagnosis to stdout; True if models run on an engine here."""
    # No markup: it would swallow the brackets of "fastgen[cpu]".
    console = Console(markup=False, highlight=False)
    options = EngineOptions.resolve()
    console.print(_machine_table())
    candidates = choices(options)
    for choice in candidates:
        # Not in a table: its cells would break the commands that a user wants to copy.
        console.print(_line(choice, picked(choice.device, candidates)), soft_wrap=True)
    console.print(f"engine cache: {_engine_cache_state(options)}", soft_wrap=True)
    if any(choice.available and choice.name != "torch" for choice in candidates):
        console.print(_transformers_state(options), soft_wrap=True)
    device = "cuda" if any(c.device == "cuda" and c.in_line for c in candidates) else "cpu"
    best = picked(device, candidates)
    if best is not None and best.name != "torch":
        console.print(f"Picked on this machine: {best.name} on {device}.", style="green")
        return True
    outcome = "models run no faster than stock torch"
    if best is None:
        outcome = f"models on {device} raise an error that says what is said above"
    console.print(f"No engine is picked: {outcome}.", style="red", soft_wrap=True)
    return False


def _transformers_state(options: EngineOptions) -> str:
    """Whether this version was met; else what trials of tiny models found (see hf/trial.py)."""
    import fastgen
    from fastgen.hf import contract, trial

    version = f"transformers {contract.VERSION}"
    if contract.is_met():
        return f"{version}: met by fastgen's tests"
    lines = [f"{version}: not met by fastgen's tests, so tried on tiny models"]
    for name in (family.class_name() for family in registry.FAMILIES.values()):
        slower = trial.slower(getattr(fastgen, name), options)
        served = ", ".join(f"{kind} calls by {path}" for kind, path in slower.items())
        lines.append(f"  {name}: {served or 'all as the stock class'}")
    return "\n".join(lines)


def _torch_problem() -> str | None:
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries is missing
        return f"torch does not import ({error})"
    return None


def _cuda_problem() -> str | None:
    """Why torch has no CUDA device; None if it has one."""
    if _torch_problem():
        return "torch does not import"
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no NVIDIA GPU or driver"


def _choice_on_request(name: str) -> EngineChoice:
    """An engine of ON_REQUEST on the GPU that torch has."""
    if problem := _backend_problem(name, "cuda"):
        return _refused(name, "cuda", problem)
    package = ON_REQUEST[name]
    reason = f"{package} {runtime.versions()[package]}, for EngineOptions(backend={name!r})"
    return EngineChoice(name, "cuda", True, reason)


def _refused(name: str, device: str, problem: FastgenError) -> EngineChoice:
    raises = isinstance(problem, MissingRuntimeError)
    return EngineChoice(name, device, False, str(problem), raises)


def _backend_problem(name: str, device: str) -> FastgenError | None:
    """What a model meets that asks for a backend on this device; None if it runs."""
    import torch

    from fastgen.engines import choice

    try:
        choice.backend(name).check(torch.device(device))
    except FastgenError as error:
        return error
    return None


def _served(options: EngineOptions, device: str) -> tuple[list[str], list[str], str]:
    """Names of the dtypes that an engine serves, of those that torch does, and why it does."""
    import torch

    from fastgen.engines.choice import choose_target

    served, left, reason = [], [], ""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        try:
            choose_target(options, torch.device(device), dtype)
            served.append(name)
        except FastgenError as error:
            left.append(name)
            reason = str(error)
    return served, left, reason


def _onnxruntime_choice(options: EngineOptions, device: str) -> EngineChoice:
    """ONNX Runtime on a device that torch has: the dtypes it serves there, or what is missing."""
    if device == "cuda" and options.backend in ON_REQUEST:
        reason = f"EngineOptions(backend={options.backend!r}) asks for another"
        return EngineChoice("onnxruntime", device, False, reason)
    served, _, reason = _served(options, device)
    if not served:
        return EngineChoice("onnxruntime", device, False, reason)
    problem = _backend_problem("onnxruntime", device)
    if problem is None and device == "cuda" and (lost := runtime.cuda_provider_problem()):
        problem = MissingRuntimeError(lost)
    if problem is not None:
        return _refused("onnxruntime", device, problem)
    version = runtime.onnxruntime().__version__
    reason = f"ONNX Runtime {version}, for models in {', '.join(served)}"
    if device == "cpu":
        reason += ", computed in float32"
    return EngineChoice("onnxruntime", device, True, reason)


def _torch_choice(options: EngineOptions, device: str, blocked: bool) -> EngineChoice:
    """torch; ``blocked`` where the engine that models should get raises an error instead."""
    name = f"torch {runtime.versions()['torch']}"
    if not blocked:
        return EngineChoice("torch", device, True, f"{name}, in every dtype")
    _, left, _ = _served(options, device)
    dtypes = f"for models in {', '.join(left)} or " if left else ""
    reason = f"{name}, only {dtypes}with EngineOptions(backend='torch')"
    return EngineChoice("torch", device, False, reason)


def _machine_table() -> Table:
    table = Table("machine", "", title=f"fastgen {__version__}", title_justify="left")
    table.add_row("python", f"{platform.python_version()} ({platform.system()})")
    table.add_row("cpu", f"{platform.machine()}, {os.cpu_count()} cores")
    table.add_row("gpu", _gpus())
    for package, version in runtime.versions().items():
        table.add_row(package, version or "-")
    return table


def _gpus() -> str:
    """One line per GPU that torch sees: name, memory, compute capability."""
    if problem := _cuda_problem():
        return f"none: {problem}"
    import torch

    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        lines.append(f"{gpu.name}, {memory:.0f} GiB, compute capability {gpu.major}.{gpu.minor}")
    return "\n".join(lines)


def _line(choice: EngineChoice, first: EngineChoice | None) -> str:
    """One engine of the report; ``first`` is the one picked on its device."""
    state = "picked" if choice == first else "in reserve" if choice.available else "no"
    return f"{choice.name} on {choice.device}: {state}: {choice.reason}"


def _engine_cache_state(options: EngineOptions) -> str:
    if not options.disk_cache:
        return "switched off by EngineOptions(disk_cache=False)"
    cache = EngineCache(options.cache_dir)
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache.folder):
            pass
    except OSError as error:
        return f"{cache.folder} cannot be written ({error}); engines are built in every process"
    entries = cache.entries()
    size = sum(entry.size for entry in entries) / 1e6
    return f"{cache.folder}, {len(entries)} compiled, {size:.1f} MB"
