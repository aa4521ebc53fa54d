"""Libraries whose layers only torch runs: what they are called, and what to do instead."""

import torch

#: The package of a module's class, and the name that users know it by.
_LIBRARIES = {
    "gptqmodel": "GPTQ's or AWQ's",
    "auto_gptq": "GPTQ's",
    "awq": "AWQ's",
    "hqq": "HQQ's",
    "compressed_tensors": "compressed-tensors'",
    "eetq": "EETQ's",
    "aqlm": "AQLM's",
    "vptq": "VPTQ's",
    "quark": "Quark's",
    "auto_round": "AutoRound's",
    "spqr_quant": "SpQR's",
    "transformers.integrations": "transformers' own",
}
_REMEDY = (
    "which only torch runs: load the model unquantised with EngineOptions(weights='int8') or "
    "'int4', or quantised by a TorchAoConfig that is weight-only"
)


def read(module: torch.nn.Module) -> str | None:
    """Why only torch runs a module; None if it is of no library that is known for that."""
    home, kind = type(module).__module__, type(module).__name__
    for package, name in _LIBRARIES.items():
        if home.startswith(f"{package}.") and "Linear" in kind:
            return f"weights are {name} {kind}, {_REMEDY}"
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and isinstance(module, torch.nn.Linear):
        return f"weights are compressed-tensors' {type(scheme).__name__}, {_REMEDY}"
    return None
