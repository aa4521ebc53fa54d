"""From a Graph to a TensorRT plan: one table of what differs between the two TensorRTs, profiles,
the build and its errors. Nothing here needs a GPU where TensorRT does not.
"""

import importlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from fastgen.engines.weight_inputs import in_place, weights_as_inputs
from fastgen.errors import EngineError, MissingRuntimeError
from fastgen.graphs.graph import Graph
from fastgen.options import EngineOptions

_log = logging.getLogger("fastgen.tensorrt")


@dataclass(frozen=True)
class Flavour:
    """What differs between TensorRT and TensorRT for RTX; all else is one API."""

    name: str
    """``EngineOptions.backend``, the package and the extra of that name."""
    module: str
    lowest: tuple[int, int]
    """First version with KV cache updates in place."""
    below: tuple[int, int]
    """First version that this file was not written against."""
    names_gpu: bool
    """Builds for a compute capability by name, and so without a GPU; the other for the GPU here."""
    compiles_at_run: bool
    """Kernels are compiled when a context first runs and kept in a runtime cache; the other times
    them at the build and keeps a timing cache."""
    flags: tuple[str, ...]
    """Builder flags without which a run cannot be captured in a CUDA graph."""


FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        Flavour("tensorrt", "tensorrt", (10, 15), (12, 0), False, False, ()),
        Flavour(
            *("tensorrt-rtx", "tensorrt_rtx", (1, 7), (2, 0), True, True),
            ("REQUIRE_USER_ALLOCATION",),
        ),
    )
}


@cache
def load(flavour: Flavour) -> Any:
    """The flavour's Python module.

    Raises:
        MissingRuntimeError: it is not installed, does not import or has another version; the
            message holds the one command that mends it.
    """
    install = f'pip install "fastgen[{flavour.name}]"'
    try:
        module = importlib.import_module(flavour.module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == flavour.module:
            raise MissingRuntimeError(f"{flavour.name} is not installed. Run: {install}") from error
        raise _does_not_import(flavour, error) from error
    except (OSError, RuntimeError) as error:  # a shared library of it is missing
        raise _does_not_import(flavour, error) from error
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if not flavour.lowest <= version < flavour.below:
        low, high = (".".join(map(str, end)) for end in (flavour.lowest, flavour.below))
        raise MissingRuntimeError(
            f"{flavour.name} {module.__version__} is installed; fastgen works with {low} up to, "
            f"not including, {high}. Run: {install} --upgrade"
        )
    return module


def _does_not_import(flavour: Flavour, error: Exception) -> MissingRuntimeError:
    return MissingRuntimeError(
        f"{flavour.name} is installed but does not import ({error}). "
        f'Run: pip install "fastgen[{flavour.name}]" --force-reinstall'
    )


class Range(NamedTuple):
    """Sizes of one axis that a profile serves, and the one that it is tuned for."""

    low: int
    best: int
    high: int


Profile = Mapping[str, Range]
"""Range of each free axis of a Graph, by the axis's letter (see ``fastgen.graphs.shape``)."""


def profiles(graph: Graph, options: EngineOptions) -> list[Profile]:
    """The profiles of a Graph: one, or where it decodes, that of a plain step and then that of
    everything else: steps of several beams, and prefill."""
    batch = Range(1, 1, options.max_batch)
    sources = Range(1, min(128, options.max_source_tokens), options.max_source_tokens)
    axes = {"B": batch, "S": sources}
    pairs = in_place(graph)
    if not pairs:
        return [axes]
    shapes = {spec.name: spec.shape for spec in graph.inputs}
    slots = int(shapes[next(iter(pairs.values()))][-2])
    # Exactly one query, or TensorRT for RTX 1.7 copies the KV buffers before each attention. Of the
    # rest, steps of a few beams run most often
    several = Range(1, min(4, slots), slots)
    return [{**axes, "Q": queries, "K": queries} for queries in (Range(1, 1, 1), several)]


@dataclass(frozen=True)
class Build:
    """Everything a plan depends on besides its Graph."""

    flavour: Flavour
    capability: tuple[int, int]
    """Compute capability of the GPU that will run the plan."""
    options: EngineOptions
    tf32: bool
    """Whether float32 products may be rounded to TF32, as torch's own then are."""


def made(trt: Any, logger: Any, make: Callable[..., Any], *arguments: Any) -> Any:
    """What ``make`` gives for ``arguments``.

    Raises:
        EngineError: TensorRT gives nothing: None, or of a constructor its bindings' TypeError.
    """
    try:
        result = make(*arguments)
    except TypeError as error:
        raise EngineError(f"TensorRT {trt.__version__}: {error}: {logger.take()}") from error
    if result is None:
        raise EngineError(f"TensorRT {trt.__version__}: {logger.take()}")
    return result


def parse(trt: Any, logger: Any, graph: Graph) -> tuple[Any, Any]:
    """A builder and the strongly typed network of a Graph, whose parameters are inputs.

    Raises:
        EngineError: TensorRT does not take the Graph; the message names the node.
    """
    builder = made(trt, logger, trt.Builder, logger)
    # Version 11 knows no other kind of network
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    flags = 0 if typed is None else 1 << int(typed)
    network = made(trt, logger, builder.create_network, flags)
    parser = made(trt, logger, trt.OnnxParser, network, logger)
    if not parser.parse(weights_as_inputs(graph)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        nodes = "; ".join(
            f"node {e.node()} {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in found
        )
        raise EngineError(f"TensorRT {trt.__version__} does not take the graph: {nodes}")
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # networks give every layer as an ILayer
            # Head sizes without a fused kernel are served by several, not refused
            layer.attention.decomposable = True
    return builder, network


def configure(trt: Any, builder: Any, graph: Graph, build: Build) -> Any:
    """The builder's config: profiles, limits, flags and the GPU.

    Raises:
        EngineError: a profile or the GPU is refused.
    """
    options, config = build.options, builder.create_builder_config()
    for flag in build.flavour.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if not build.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.build_memory_mb is not None:
        pool = trt.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, options.build_memory_mb * 2**20)
    config.builder_optimization_level = options.build_level
    for ranges in profiles(graph, options):
        profile = make_profile(builder, graph, ranges)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"TensorRT {trt.__version__} refuses the profile {dict(ranges)}")
    if build.flavour.names_gpu:
        name = "SM{}{}".format(*build.capability)
        generation = getattr(trt.ComputeCapability, name, None)
        config.num_compute_capabilities = 1
        if generation is None or not config.set_compute_capability(generation, 0):
            raise EngineError(f"{build.flavour.name} {trt.__version__} does not build for {name}")
    return config


def make_profile(builder: Any, graph: Graph, ranges: Profile) -> Any:
    """TensorRT's profile of a Graph's inputs; parameters, whose shapes are fixed, need none."""
    profile = builder.create_optimization_profile()
    for spec in graph.inputs:
        ends = [
            tuple(ranges[axis][end] if isinstance(axis, str) else axis for axis in spec.shape)
            for end in range(3)
        ]
        profile.set_shape(spec.name, *ends)
    return profile


def build_plan(graph: Graph, build: Build, title: str, timings: bytes) -> tuple[bytes, bytes]:
    """Compile a Graph.

    Args:
        title: what the progress bar shows, e.g. "decoder".
        timings: a timing cache from earlier builds, or nothing.

    Returns:
        The plan, and the timing cache with what this build added (nothing from a flavour that
        compiles its kernels when they run).

    Raises:
        EngineError: TensorRT fails, or takes longer than ``EngineOptions.build_seconds``; the
            message names the layer.
    """
    trt = load(build.flavour)
    logger = make_logger(trt)
    logger.take()  # what an earlier failure left
    builder, network = parse(trt, logger, graph)
    config = configure(trt, builder, graph, build)
    kept = None if build.flavour.compiles_at_run else use_timings(config, timings)
    logger.take()  # that a cache was refused is no reason of a failure to come
    with progress_monitor(trt, title, build.options.build_seconds) as monitor:
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        if monitor.cancelled:
            raise EngineError(
                f"TensorRT {trt.__version__} did not build {title} within "
                f"EngineOptions(build_seconds={build.options.build_seconds}). Give it longer, or "
                "a lower build_level."
            )
        raise EngineError(f"TensorRT {trt.__version__} did not build {title}: {logger.take()}")
    grown = None if kept is None else kept.serialize()
    return bytes(plan), b"" if grown is None else bytes(grown)


def use_timings(config: Any, timings: bytes) -> Any:
    """The timing cache that a builder's config was given, which must live until the plan is built:
    that of earlier builds or, where TensorRT refuses it (it is damaged, or of another GPU), an
    empty one. None if it refuses that too, and times everything anew."""
    for data in dict.fromkeys((timings, b"")):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


@cache
def make_logger(trt: Any) -> Any:
    """TensorRT's logger of this process: errors are kept for exceptions, the rest is logged."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []  # of any thread: builders have threads of their own

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._errors.append(message)
            _log.log(_LEVELS.get(severity.name, logging.DEBUG), message)

        def take(self, default: str = "it gave no reason") -> str:
            """The errors since the last call, as one line."""
            messages, self._errors = self._errors, []
            return "; ".join(messages) or default

    return Logger()


# Errors become exceptions, and warnings are about what TensorRT chose: both are for debugging
_LEVELS = {"INTERNAL_ERROR": logging.INFO, "ERROR": logging.INFO, "WARNING": logging.DEBUG}


@contextmanager
def progress_monitor(trt: Any, title: str, seconds: int | None) -> Iterator[Any]:
    """A monitor that shows a bar from the build's second second on, and stops it after
    ``seconds``; ``cancelled`` says whether it did."""
    bar = tqdm(desc=title, total=0, delay=1.0, leave=False, unit="step")
    limit = None if seconds is None else time.monotonic() + seconds

    class Monitor(trt.IProgressMonitor):
        cancelled = False

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            bar.total += steps
            bar.set_description(f"{title}: {phase}", refresh=False)

        def step_complete(self, phase: str, step: int) -> bool:
            bar.update()
            self.cancelled = self.cancelled or (limit is not None and time.monotonic() > limit)
            return not self.cancelled

        def phase_finish(self, phase: str) -> None:
            pass  # it may have had fewer steps than announced

    try:
        yield Monitor()
    finally:
        bar.close()
