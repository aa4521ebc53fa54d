"""The signatures of TensorRT's Python bindings: read out of the real ones, kept as test data.

The files in ``signatures/`` are what the bindings say of themselves (names, arguments, enums), so
that every machine can hold fastgen's calls against them. Make them again, or those of a new
version, with (Linux x86-64, a C compiler, and the package index):

    python -m tests.engines.tensorrt_signatures tensorrt-cu13-bindings==10.15.1.29 \\
        tensorrt-cu13-bindings==11.4.0.106 tensorrt-rtx-cu13-bindings==1.7.1.116

The bindings (1.2 MB) import without TensorRT's libraries: empty ones stand in.
"""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FOLDER = Path(__file__).parent / "signatures"
CLASSES = (
    *("Builder", "IAttention", "IAttentionBoundaryLayer", "IAttentionInputLayer"),
    *("IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILayer", "ILogger"),
    *("INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "IRuntimeCache"),
    *("IRuntimeConfig", "ITensor", "ITimingCache", "OnnxParser", "ParserError", "Runtime"),
)
ENUMS = (
    *("BuilderFlag", "ComputeCapability", "DataType", "ExecutionContextAllocationStrategy"),
    *("DynamicShapesKernelSpecializationStrategy", "HardwareCompatibilityLevel", "LayerType"),
    *("MemoryPoolType", "NetworkDefinitionCreationFlag"),
)
_KINDS = {"SupportsInt": "int", "SupportsFloat": "float", "buffer": "Buffer"}
_KINDS |= {"IParserError": "ParserError"}  # its name in C++


def describe(trt: Any) -> dict[str, Any]:
    """Classes with their methods and properties, and enums, of a module of bindings."""
    found = {name: getattr(trt, name) for name in CLASSES if hasattr(trt, name)}
    return {
        "version": trt.__version__,
        "enums": {n: list(getattr(trt, n).__members__) for n in ENUMS if hasattr(trt, n)},
        "classes": {name: _class(kind) for name, kind in found.items()},
    }


def _class(kind: Any) -> dict[str, Any]:
    """Members by name: the signatures of a method, or of a property what it gives and takes."""
    members: dict[str, Any] = {}
    for name in dir(kind):
        member = getattr(kind, name)
        if isinstance(member, property):
            members[name] = _property(member)
        elif name == "__init__" or (not name.startswith("_") and callable(member)):
            members[name] = _overloads(member.__doc__ or "", name)
        elif not name.startswith("_") and hasattr(member, "name"):
            members[name] = "enum member"
    bases = [base.__name__ for base in kind.__mro__[1:] if base.__name__ in CLASSES]
    return {"bases": bases, "members": members}


def _property(member: Any) -> dict[str, Any]:
    gives = re.search(r"-> (.+)", member.fget.__doc__ or "")
    setter = _overloads(f"set{member.fset.__doc__}", "set") if member.fset else None
    takes = re.search(r"arg1: (\w+)\)", setter[0]) if setter else None
    return {"gives": _kind(gives[1]) if gives else "object", "takes": takes and takes[1]}


def _overloads(doc: str, name: str) -> list[str]:
    """``["(cache: ITimingCache, ignore_mismatch: bool) -> bool"]`` of pybind's docstring; what
    has a default ends in ``= ...``."""
    lines = re.findall(rf"^(?:\d+\. )?{name}\((.*)\) -> (.+)$", doc, re.MULTILINE)
    overloads = []
    for arguments, gives in lines:
        takes = []
        for argument in split(arguments)[1:]:  # without self
            label, _, kind = argument.partition(": ")
            kind, default, _ = kind.partition(" = ")
            takes.append(f"{label}: {_kind(kind)}{' = ...' * bool(default)}")
        overloads.append(f"({', '.join(takes)}) -> {_kind(gives)}")
    return overloads


def split(arguments: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "[(<{") - (character in "])>}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _kind(text: str) -> str:
    """A type without the names of its modules."""
    name = re.sub(r"\b\w+(\.|::)", "", text.strip())
    return _KINDS.get(name, name)


# Making the files


def make(requirement: str) -> Path:
    """Download bindings, e.g. ``tensorrt-cu13-bindings==10.15.1.29``, and describe them."""
    library = "tensorrt_rtx" if "rtx" in requirement else "tensorrt"
    with TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "-d", folder, requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
        package = Path(folder) / f"{library}_bindings"
        _stand_ins(package / f"{library}.so")
        code = (
            f"import sys; sys.path.insert(0, {folder!r}); sys.path.insert(1, {str(Path.cwd())!r})\n"
            f"import json, {package.name} as trt; from tests.engines import tensorrt_signatures\n"
            "print(json.dumps(tensorrt_signatures.describe(trt)))"
        )
        result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = json.loads(result.stdout)
    path = FOLDER / f"{library.replace('_', '-')}-{found['version']}.json"
    path.write_text(_text(found))
    return path


def _stand_ins(bindings: Path) -> None:
    """Empty libraries beside the bindings, with what these ask for."""
    needed = subprocess.check_output(["readelf", "-d", bindings], text=True)
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", bindings], text=True)
    asked = r"\bU ((?:create|get|init)\w*(?:_INTERNAL|Plugin|Parser|Registry)\w*)$"
    names = re.findall(asked, symbols, re.MULTILINE)
    source = bindings.with_suffix(".c")
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    for name in re.findall(r"\[(lib(?:nv|tensorrt)\w+\.so[\d.]*)\]", needed):
        command = ["cc", "-shared", "-fPIC", "-o", bindings.parent / name, source]
        subprocess.run([*command, f"-Wl,-soname,{name}"], check=True)


def _text(found: dict[str, Any]) -> str:
    """JSON with a line for each member."""
    text = json.dumps(found, indent=1, sort_keys=True)
    # What lies deeper than a member goes into its line
    return re.sub(r"\n {5,}(\S[^\n]*)|\n {4}([\]}])", r" \1\2", text) + "\n"


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        print(make(wanted))
