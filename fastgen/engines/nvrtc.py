"""CUDA kernels compiled at run time, and launches that start while the ones before them run.

The CUDA builds of torch bring both libraries used here: NVRTC and cuda-bindings.
"""

import ctypes
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from fastgen.engine_cache import Artifact, EngineCache
from fastgen.errors import EngineError

ELEMENTS = {torch.float32: "float", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""What the kernels' sources call a dtype."""
_SHARED_BYTES = 48 * 1024  # that a block may have without being told so


def refusal(device: torch.device) -> str | None:
    """Why a GPU cannot run fastgen's kernels; None if it can."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "fused kernels need compute capability 8.0"
    return missing()


def missing() -> str | None:
    """Why kernels cannot be compiled here; None if they can."""
    if (
        importlib.util.find_spec("cuda") is None
        or importlib.util.find_spec("cuda.bindings") is None
    ):
        return "the package cuda-bindings is not installed"
    return None


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what to run, over how many blocks, with which arguments."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    arguments: ctypes.Structure
    """The kernel's only parameter; it holds pointers, so their tensors must stay alive."""
    shared_bytes: int = 0
    cluster: int = 1
    """Neighbouring blocks that run together and read each other's shared memory."""
    overlaps: bool = True
    """Start while earlier launches still run: the kernel itself waits for what they write."""


class Program:
    """Compiled kernels by name, loaded on one device."""

    def __init__(self, code: bytes, device: torch.device) -> None:
        """``code`` is what ``compiled`` gave for the device's architecture."""
        from cuda.bindings import driver

        self._device = device
        self._overlap = torch.cuda.get_device_capability(device) >= (9, 0)
        with torch.cuda.device(device):
            self._module = _checked(driver.cuModuleLoadData(code))
        self._functions: dict[str, Any] = {}
        self._granted: dict[str, int] = {}  # bytes of shared memory, where a launch needs many

    def prepare(self, launch: Launch) -> "PreparedLaunch":
        """Look the kernel up and make its launch ready to repeat."""
        from cuda.bindings import driver

        if launch.kernel not in self._functions:
            name = launch.kernel.encode()
            self._functions[launch.kernel] = _checked(
                driver.cuModuleGetFunction(self._module, name)
            )
        function = self._functions[launch.kernel]
        if launch.shared_bytes > self._granted.get(launch.kernel, _SHARED_BYTES):
            self._granted[launch.kernel] = launch.shared_bytes  # and never fewer: others run on
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, most, launch.shared_bytes))
        return PreparedLaunch(self, function, launch, self._overlap and launch.overlaps)


class PreparedLaunch:
    """A launch with everything looked up; calling it queues the kernel on a stream."""

    def __init__(self, program: Program, function: Any, launch: Launch, overlap: bool) -> None:
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *launch.grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes = launch.shared_bytes
        names, attributes = driver.CUlaunchAttributeID, []
        if launch.cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attribute.value.clusterDim
            size.x, size.y, size.z = launch.cluster, 1, 1
            attributes.append(attribute)
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.arguments))
        self._keep = program, launch, pointers
        self._launch = driver.cuLaunchKernelEx
        self._config, self._function = config, function
        self._parameters = ctypes.addressof(pointers)

    def __call__(self, stream: int, blocks: int | None = None) -> None:
        """Queue the kernel on a CUDA stream given by its handle.

        Args:
            blocks: of the grid's first axis, if not those of the Launch.
        """
        self._config.hStream = stream
        if blocks is not None:
            self._config.gridDimX = blocks
        _checked(self._launch(self._config, self._function, self._parameters, 0))


_programs: dict[tuple[str, torch.device], Program] = {}


def program(source: str, device: torch.device, engine_cache: EngineCache | None = None) -> Program:
    """Kernels of CUDA source: compiled once a process, and with an engine cache once a machine."""
    if (source, device) not in _programs:
        arch = architecture(device)

        def build() -> Artifact:
            return Artifact(compiled(source, arch), {})

        if engine_cache is None:
            artifact = build()
        else:
            key = {"kernels": source, "arch": arch, "nvrtc": version()}
            artifact = engine_cache.load_or_build(key, build, title=f"CUDA kernels ({arch})")
        _programs[source, device] = Program(artifact.data, device)
    return _programs[source, device]


def compiled(source: str, arch: str) -> bytes:
    """Machine code of CUDA source for an architecture such as ``sm_90``.

    Raises:
        EngineError: NVRTC refused the source; the message holds its log.
    """
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"fastgen.cu", 0, [], []))
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise EngineError(
            f"NVRTC refused the kernels for {arch}: {log.decode().strip(chr(0))[:2000]}"
        )
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def version() -> str:
    """Version of the NVRTC that compiles."""
    from cuda.bindings import nvrtc

    return ".".join(map(str, _checked(nvrtc.nvrtcVersion(), all_values=True)))


def architecture(device: torch.device) -> str:
    """What to compile for, such as ``sm_89``; ``sm_90a`` has what no later GPU has, too."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def tensor_map(matrix: torch.Tensor, rows: int) -> bytes:
    """What a kernel needs for bulk copies of boxes of a matrix: a CUtensorMap.

    Args:
        matrix: int8 [N, K], contiguous, on a GPU; K a multiple of 16.
        rows: of a box, at most 256; it has 128 columns, which come swizzled, as tensor cores read
            them, and zeros where it reaches beyond the matrix.
    """
    from cuda.bindings import driver as api

    long, number = api.cuuint64_t, api.cuuint32_t
    found = _checked(
        api.cuTensorMapEncodeTiled(
            api.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            matrix.data_ptr(),
            [long(matrix.shape[1]), long(matrix.shape[0])],
            [long(matrix.shape[1])],
            [number(128), number(rows)],
            [number(1), number(1)],
            api.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            api.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            api.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(found.getPtr(), 128)


def _checked(results: tuple[Any, ...], all_values: bool = False) -> Any:
    """The value (or all values) of a cuda-bindings call, or an EngineError."""
    error, *values = results
    if error.value:
        raise EngineError(f"CUDA failed: {error.name}")
    if all_values:
        return values
    return values[0] if values else None
