"""Is TensorRT right, and how fast? One command on a supported GPU; it prints a report to paste.

python benchmarks/tensorrt_check.py t5-small t5-base --backend tensorrt-rtx --dtype bfloat16
python benchmarks/tensorrt_check.py t5-small t5-base --build-only --capability 8.9

``--build-only`` needs no GPU with tensorrt-rtx: build time, plan size and operators of each graph.
"""

import gc
import platform
import statistics
import time
from typing import Annotated, Any
from unittest.mock import patch

import torch
import transformers
import typer

from fastgen import EngineOptions, FastT5ForConditionalGeneration, __version__, runtime
from fastgen import target as targets
from fastgen.bench.shapes import shape_config
from fastgen.bench.workload import Workload, standard_grid
from fastgen.engines import choice
from fastgen.engines.recording import Recorder
from fastgen.engines.tensorrt_build import FLAVOURS, Build, build_plan
from fastgen.graphs.graph import Graph
from fastgen.hf.module import EngineModule

NEW_TOKENS, WARM_UPS, CALLS = 64, 3, 7
ENGINES = ("tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt")


def main(
    shapes: Annotated[list[str], typer.Argument(help="Shape names such as t5-small.")],
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(ENGINES)}.")] = "tensorrt-rtx",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "bfloat16",
    build_only: Annotated[bool, typer.Option("--build-only", help="Build, do not run.")] = False,
    capability: Annotated[str, typer.Option(help="With --build-only: of which GPU.")] = "8.9",
) -> None:
    """Print the report of every shape."""
    packages = ("torch", "transformers", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")
    versions = runtime.versions()
    print(f"fastgen {__version__}, {backend}, {dtype}, python {platform.python_version()}")
    print(", ".join(f"{name} {versions[name]}" for name in packages if versions[name]))
    for shape in shapes:
        if build_only:
            build(shape, backend, dtype, capability)
        else:
            check(shape, backend, dtype)


def build(shape: str, backend: str, dtype: str, capability: str) -> None:
    """Build all plans of a shape; no weight is made, and none is needed."""
    major, minor = (int(part) for part in capability.split("."))
    options = EngineOptions(disk_cache=False)
    wanted = Build(FLAVOURS[backend], (major, minor), options, tf32=False)
    for name, graph in graphs(shape, targets.tensorrt(dtype, backend)).items():
        start, busy = time.perf_counter(), time.process_time()
        plan, _ = build_plan(graph, wanted, f"{shape} {name}", b"")
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        counts = ", ".join(f"{count} {kind}" for kind, count in graph.operators().items())
        print(
            f"{shape} {name}: {seconds:.1f} s ({busy:.1f} s of CPU time), "
            f"plan {len(plan) / 1e6:.2f} MB; {counts}"
        )


def graphs(shape: str, target: targets.Target) -> dict[str, Graph]:
    """The graphs of a shape for a Target."""
    with torch.device("meta"):
        model = FastT5ForConditionalGeneration(shape_config(shape)).eval()
    kept = model._keep_in_fp32_modules or [] if target.dtype == "float16" else []
    for name, parameter in model.named_parameters():
        if not set(kept) & set(name.split(".")):
            parameter.data = parameter.data.to(getattr(torch, target.dtype))
    model.engine_options = EngineOptions(disk_cache=False)
    recorder = Recorder()
    with patch.object(choice, "backend", lambda name: recorder):
        for module in model.modules():
            if isinstance(module, EngineModule) and not module._waits:
                module._build_engine(target)
    return recorder.graphs


def check(shape: str, backend: str, dtype: str) -> None:
    """Compare a shape's logits and tokens with stock Hugging Face's, then time ``generate``."""
    gpu = torch.cuda.get_device_properties(0)
    print(f"{shape} on {gpu.name}, compute capability {gpu.major}.{gpu.minor}")
    torch.manual_seed(0)
    config = shape_config(shape)
    model = FastT5ForConditionalGeneration(config).eval()
    reference = transformers.T5ForConditionalGeneration(config).eval()
    reference.load_state_dict(model.state_dict())
    stock = transformers.T5ForConditionalGeneration(config).eval()
    stock.load_state_dict(model.state_dict())
    narrow = getattr(torch, dtype)
    model, stock, reference = model.cuda().to(narrow), stock.cuda().to(narrow), reference.cuda()
    model.generation_config.eos_token_id = config.vocab_size  # never chosen
    model.engine_options = EngineOptions(backend=backend)  # type: ignore[arg-type]
    free = torch.cuda.mem_get_info()[0]
    start = time.perf_counter()
    model.compile_engine()
    print(f"  engines ready in {time.perf_counter() - start:.1f} s")
    _compare(model, stock, reference)
    for workload in standard_grid(NEW_TOKENS):
        _time(model, workload)
    print(f"  memory besides the weights: {(free - torch.cuda.mem_get_info()[0]) / 2**20:.0f} MiB")
    _print_partition(model)
    del model, stock, reference
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def _compare(model: Any, stock: Any, reference: Any) -> None:
    """Distance of logits to the float32 reference, fastgen's beside stock's; then tokens."""
    ids = torch.randint(2, 32000, (4, 48), device="cuda")
    mask = torch.ones_like(ids)
    mask[1:, 40:] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    decoder_ids = torch.randint(2, 32000, (4, 9), device="cuda")
    assert (reason := model.refusal(decoder_input_ids=decoder_ids, **call)) is None, reason
    right = reference(decoder_input_ids=decoder_ids, **call).logits
    ours, theirs = (m(decoder_input_ids=decoder_ids, **call).logits for m in (model, stock))
    errors = [float((logits.float() - right).abs().max()) for logits in (ours, theirs)]
    spread = float(right.std())
    print(f"  largest logits error (spread {spread:.3g}): {errors[0]:.3g}, stock {errors[1]:.3g}")
    for beams in (1, 4):
        arguments = {**call, "max_new_tokens": 32, "num_beams": beams}
        tokens = [m.generate(**arguments, eos_token_id=None) for m in (model, stock)]
        equal = float((tokens[0] == tokens[1]).float().mean())
        path = model.explain(**arguments).path
        print(f"  {beams} beams, {path}: {100 * equal:.1f} % of tokens equal stock's")


def _time(model: Any, workload: Workload) -> None:
    ids = torch.randint(2, 32000, (workload.batch, workload.prompt_tokens), device="cuda")
    arguments = {"num_beams": workload.beams, "do_sample": workload.sample}
    if workload.sample:
        arguments |= {"top_k": 50, "top_p": 0.9}
    times = []
    for _ in range(WARM_UPS + CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=NEW_TOKENS, **arguments)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    print(
        f"  batch {workload.batch}, prompt {workload.prompt_tokens}, {workload.beams} beams"
        f"{', sampled' * workload.sample}: "
        f"{statistics.median(times[WARM_UPS:]) / NEW_TOKENS:.4f} ms/token"
    )


def _print_partition(model: Any) -> None:
    """Which provider runs which operator, where ONNX Runtime divides the graphs."""
    decoder = model._engine
    for name, engine in (("encoder", model.encoder._engine), ("cross", decoder.cross)):
        if hasattr(engine, "partition"):
            print(f"  {name}: {engine.partition()}")


if __name__ == "__main__":
    typer.run(main)
