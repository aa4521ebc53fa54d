"""The choice of an engine for a device and dtype."""

import platform
from dataclasses import replace

import torch

from fastgen import target as targets
from fastgen.blockwise import GROUPS
from fastgen.engines import TENSORRT, Backend, NoEngine
from fastgen.options import EngineOptions
from fastgen.target import Target


def backend(name: str) -> Backend:
    """The Backend of a Target, by ``Target.backend``."""
    if name in TENSORRT:
        from fastgen.engines.tensorrt import TensorRT

        return TensorRT(name)
    from fastgen.engines.onnxruntime import OnnxRuntime

    return OnnxRuntime(name)


def choose_target(options: EngineOptions, device: torch.device, dtype: torch.dtype) -> Target:
    """The Target that serves a model on ``device`` in ``dtype``, with the weights asked for.

    On the CPU it computes in float32, whatever the model is in: ONNX Runtime has no products of 16
    bits there, but on Arm.

    Raises:
        NoEngine: none does; the reason is what ``model.explain()`` shows.
    """
    target, kind = _whole(options, device, dtype), options.weights
    if kind == "full":
        return target
    if kind == "fp8" and target.device == "cpu":
        raise NoEngine(
            "EngineOptions(weights='fp8') is for NVIDIA GPUs: on the CPU take weights='int8' or "
            "'int4', or move the model by model.to('cuda')"
        )
    if target.backend != "onnxruntime":
        raise NoEngine(
            f"{target.backend} is given weights as they are: leave EngineOptions(weights={kind!r}) "
            "out, or take backend='onnxruntime'"
        )
    return replace(target, weights=kind, group=GROUPS[kind])


def _whole(options: EngineOptions, device: torch.device, dtype: torch.dtype) -> Target:
    """``choose_target`` for weights as they are."""
    name = str(dtype).removeprefix("torch.")
    if options.backend == "torch":
        raise NoEngine("EngineOptions(backend='torch') switches engines off")
    if device.type == "cpu":
        if options.backend not in ("auto", "onnxruntime"):
            raise NoEngine(f"{options.backend} runs on NVIDIA GPUs: model.to('cuda')")
        _refuse_other_dtypes(name)
        return targets.onnxruntime_cpu(saturates=_saturates())
    if device.type == "cuda":
        _refuse_other_dtypes(name)
        if options.backend in TENSORRT:
            return targets.tensorrt(name, options.backend)
        if options.backend == "onnxruntime-tensorrt":
            return targets.onnxruntime_tensorrt(name)
        return targets.onnxruntime_cuda(name)
    raise NoEngine(f"no engine runs on device {device.type!r}: cpu and cuda are served")


def _refuse_other_dtypes(name: str) -> None:
    if name not in ("float32", "float16", "bfloat16"):
        raise NoEngine(
            f"no engine serves models in {name}: load it with dtype=torch.float32 (float16 and "
            "bfloat16 are served, too), or call model.float()"
        )


def _saturates() -> bool:
    """Whether products of uint8 and int8 are added in 16 bits, two by two: on x86 without VNNI."""
    known = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return platform.machine().lower() in ("x86_64", "amd64") and not known()
