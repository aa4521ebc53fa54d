"""The installed runtimes: which there are, and ONNX Runtime imported ready to use."""

import functools
import importlib
import importlib.metadata
import os
from types import ModuleType

from fastgen.errors import MissingRuntimeError

_PACKAGES = (
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "onnxscript",
    "tensorrt",
    "tensorrt-rtx",
    "ctranslate2",
)
_INSTALL_CPU = 'pip install "fastgen[cpu]"'
_INSTALL_CUDA = 'pip install "fastgen[cuda]"'


def versions() -> dict[str, str | None]:
    """Installed version of each package fastgen works with; None where it is not installed."""
    return {package: _version(package) for package in _PACKAGES}


@functools.cache
def onnxruntime() -> ModuleType:
    """The ``onnxruntime`` module, with pip's NVIDIA libraries loaded if it is a CUDA build.

    Its telemetry stays off, unless the user set ``ORT_DISABLE_TELEMETRY`` or imported it before:
    from 1.29 on a thread that sends usage data, and that a forked child waits for at its end.

    Raises:
        MissingRuntimeError: it is not installed, installed twice or does not import; the
            message holds the one command that mends it.
    """
    installed = versions()
    folders = [_folder(package) for package in ("onnxruntime", "onnxruntime-gpu")]
    if folders[0] is not None and folders[0] == folders[1]:
        raise MissingRuntimeError(
            f"Both onnxruntime {installed['onnxruntime']} and onnxruntime-gpu "
            f"{installed['onnxruntime-gpu']} are installed; they are one module in two packages "
            "and overwrite each other. Run: "
            f"pip uninstall -y onnxruntime onnxruntime-gpu && {_install()}"
        )
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is imported
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        install = _install()
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise MissingRuntimeError(f"ONNX Runtime is not installed. Run: {install}") from error
        raise MissingRuntimeError(
            f"ONNX Runtime is installed but does not import ({error}). "
            f"Run: {install} --force-reinstall"
        ) from error
    if "CUDAExecutionProvider" in module.get_available_providers():
        module.preload_dlls(directory="")
    return module


def cuda_build_problem() -> str | None:
    """Why the installed ONNX Runtime serves no GPU at all, with the remedy; None if it may.

    Raises:
        MissingRuntimeError: as ``onnxruntime()``.
    """
    module = onnxruntime()
    if "CUDAExecutionProvider" in module.get_available_providers():
        return None
    return (
        f"the installed ONNX Runtime {module.__version__} is a CPU build. "
        f"Run: pip uninstall -y onnxruntime && {_INSTALL_CUDA}"
    )


@functools.cache
def cuda_provider_problem() -> str | None:
    """Why ONNX Runtime cannot run on this machine's GPU, with the remedy; None if it can.

    Answered by loading the CUDA execution provider, since a CUDA build is listed as available
    even where its libraries are missing. Assumes that torch sees a CUDA device.

    Raises:
        MissingRuntimeError: as ``onnxruntime()``.
    """
    if problem := cuda_build_problem():
        return problem
    module = onnxruntime()
    session = module.InferenceSession(_identity_model(), providers=["CUDAExecutionProvider"])
    if "CUDAExecutionProvider" in session.get_providers():
        return None
    cuda = getattr(module, "cuda_version", "") or "of its build"
    return (
        f"ONNX Runtime {module.__version__} needs the libraries of CUDA {cuda}, which did not "
        f"load. Run: {_INSTALL_CUDA}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder(package: str) -> str | None:
    """Where a package is installed; two of one module shadow each other only in one folder."""
    try:
        return str(importlib.metadata.distribution(package).locate_file(""))
    except importlib.metadata.PackageNotFoundError:
        return None


def _install() -> str:
    """The command that installs the ONNX Runtime for this machine."""
    import torch

    return _INSTALL_CUDA if torch.cuda.is_available() else _INSTALL_CPU


def _identity_model() -> bytes:
    """The smallest ONNX model: y = x, of shape [1] in fp32."""
    from onnx import TensorProto, checker, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    # Opset 17, IR 8: older than any supported ONNX Runtime, so that only the provider can fail.
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    checker.check_model(model)
    return model.SerializeToString()
