"""A transformers version that the test-suite has not met is tried before it is trusted.

A tiny random model of a Fast class is compared with its stock class, fp32 on the CPU, once a
machine: the verdict is kept on disk. What differs takes the slower path that agrees, from the fast
loop to the HF loop to torch; so a change of transformers' inner ways costs speed, not tokens.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import transformers

from fastgen import __version__
from fastgen.engine_cache import EngineCache
from fastgen.engines.side_file import SideFile
from fastgen.errors import MissingRuntimeError
from fastgen.fingerprint import fingerprint
from fastgen.hf import contract
from fastgen.hf.stock import is_ours, stock_class
from fastgen.options import EngineOptions

PATHS = ("fast loop", "HF loop", "torch")
"""From the fastest to the one that is stock transformers itself."""

_VOCABULARY = 48
_OPTIONS = EngineOptions(
    backend="onnxruntime", disk_cache=False, intra_op_threads=1, prepack=0, min_bucket=16
)
_CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 2},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "assisted": {"prompt_lookup_num_tokens": 2},
}
_ONLY_BY_HF_LOOP = ("assisted",)

Verdict = Mapping[str, str]
"""The fastest right path of each kind of call: ``forward`` and those of ``_CALLS``."""

_Call = Callable[[Any], tuple[torch.Tensor, ...]]

_lock = threading.RLock()
_on_trial = threading.local()


def path(fast: type, kind: str, options: EngineOptions) -> str:
    """The fastest path (of ``PATHS``) that gives a Fast class stock's results in calls of a kind.

    Args:
        kind: ``forward``, ``greedy``, ``sample``, ``beams``, ``beam sample`` or ``assisted``.
        options: say where the verdict is kept.
    """
    if contract.is_met() or getattr(_on_trial, "now", False):
        return PATHS[0]
    own = next(filter(is_ours, fast.__mro__))
    verdict = _verdict(own, options.cache_dir if options.disk_cache else ..., contract.VERSION)
    return "torch" if verdict["forward"] == "torch" else verdict.get(kind, PATHS[0])


def reason(kind: str, path: str) -> str:
    """Why calls of a kind take a slower path, in words for users."""
    return (
        f"transformers {transformers.__version__} is newer than this fastgen has met, and gave "
        f"other results in a trial of {kind} calls, which {path} serves: look for a newer fastgen"
    )


def slower(fast: type, options: EngineOptions) -> dict[str, str]:
    """The kinds of call that do not take the path they take with a version that was met."""
    kinds = {"forward": PATHS[0], **dict.fromkeys(_CALLS, PATHS[0])}
    kinds |= dict.fromkeys(_ONLY_BY_HF_LOOP, PATHS[1])
    found = {kind: path(fast, kind, options) for kind in kinds}
    return {kind: taken for kind, taken in found.items() if _RANK[taken] > _RANK[kinds[kind]]}


_RANK = {name: rank for rank, name in enumerate(PATHS)}


@cache
def _verdict(fast: type, cache_dir: Any, _: Any) -> Verdict:
    with _lock:
        folder = None if cache_dir is ... else EngineCache(cache_dir).folder
        versions = {name: library.__version__ for name, library in _LIBRARIES.items()}
        versions["fastgen"] = __version__
        name = fingerprint(versions | {"class": f"{fast.__module__}.{fast.__qualname__}"})
        file = SideFile(folder, f"{name}.trial")
        try:
            kept = json.loads(file.read() or b"{}")
        except ValueError:  # a damaged file is as good as none
            kept = {}
        if "forward" not in kept:
            kept = _try(fast)
            file.write(json.dumps(kept).encode())
        return dict(kept)


_LIBRARIES: dict[str, Any] = {"transformers": transformers, "torch": torch}


def _try(fast: type) -> dict[str, str]:
    """Compare ``fast`` with its stock class in every kind of call."""
    with _quiet_and_alone():
        stock, own = _models(fast)
        decodes, calls = hasattr(fast, "_sample"), [_forward]
        if decodes:
            calls.append(_continued)
        elif getattr(stock.config, "is_decoder", False):  # not every config says
            calls = [_stack]
        right = all(_fastest(call, stock, own, PATHS[1:2]) != "torch" for call in calls)
        verdict = {"forward": PATHS[0] if right else "torch"}
        for kind, arguments in (_CALLS if decodes and right else {}).items():
            paths = PATHS[1:2] if kind in _ONLY_BY_HF_LOOP else PATHS[:2]
            call = partial(_generate, arguments=arguments)
            verdict[kind] = _fastest(call, stock, own, paths)
        return verdict


@contextmanager
def _quiet_and_alone() -> Iterator[None]:
    """Leave no trace in the program: generators, modes, defaults, log lines, warnings."""
    dtype, verbosity = torch.get_default_dtype(), transformers.logging.get_verbosity()
    _on_trial.now = True
    try:
        torch.set_default_dtype(torch.float32)
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        _on_trial.now = False
        torch.set_default_dtype(dtype)
        transformers.logging.set_verbosity(verbosity)


def _models(fast: type) -> tuple[Any, Any]:
    """A stock model of a tiny size, and the Fast one with its weights."""
    names: dict[str, Any] = dict(fast.trial_config)  # type: ignore[attr-defined]
    names |= {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 0}
    ends = list(range(1, 7))  # likely enough that rows end at different steps
    stock_type = stock_class(fast)
    config = stock_type.config_class(**names, eos_token_id=ends)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    stock = stock_type(config).eval()
    torch.manual_seed(0)
    for parameter in stock.parameters():
        noise = torch.randn(parameter.shape)
        wide = parameter.ndim > 1
        parameter.copy_(2 * parameter.shape[-1] ** -0.5 * noise if wide else 1 + 0.2 * noise)
    own: Any = fast(stock.config).eval()
    own.load_state_dict(stock.state_dict())
    return stock, own


def _fastest(call: _Call, stock: Any, own: Any, paths: Sequence[str]) -> str:
    """The first of ``paths`` on which our model gives what stock's does; failing is not that."""
    expected = None
    for path in paths:
        own._engine_options = replace(_OPTIONS, fast_loop=path == PATHS[0])
        try:
            expected = call(stock) if expected is None else expected
            if all(map(_equal, expected, call(own))):
                return path
        except MissingRuntimeError:
            raise
        except Exception:  # whatever it is, torch alone has it not
            continue
    return "torch"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3)


def _inputs(rows: int = 2, left: bool = False) -> dict[str, torch.Tensor]:
    """Source tokens (or a prompt's) [rows, 5]; the second row is shorter, padded on a side."""
    ids = torch.randint(8, _VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    mask = mask.flip(1) if left else mask
    return {"input_ids": (ids * mask)[:rows], "attention_mask": mask[:rows]}


def _is_decoder_only(model: Any) -> bool:
    return hasattr(model, "_sample") and not model.config.is_encoder_decoder


def _forward(model: Any) -> tuple[torch.Tensor, ...]:
    arguments: dict[str, Any] = {"use_cache": False}
    if _is_decoder_only(model):
        return (model(**_inputs(1), **arguments)[0],)
    if hasattr(model, "_sample"):
        arguments["decoder_input_ids"] = _inputs()["input_ids"][:, :1]
    output, mask = model(**_inputs(), **arguments)[0], _inputs()["attention_mask"].bool()
    return (output[mask] if output.shape[:2] == mask.shape else output,)  # padding nobody reads


def _stack(model: Any) -> tuple[torch.Tensor, ...]:
    """Two tokens and a further one by a decoder's stack."""
    generator = torch.Generator().manual_seed(2)
    source = torch.randn(2, 5, model.config.hidden_size, generator=generator)
    inputs = _inputs()
    given = {"encoder_hidden_states": source, "encoder_attention_mask": inputs["attention_mask"]}
    first = model(input_ids=inputs["input_ids"][:, :2], **given, use_cache=True)
    kept = {contract.CACHE: first[contract.CACHE]}
    step = model(input_ids=inputs["input_ids"][:, 2:3], **given, **kept, use_cache=True)
    return first[0], step[0]


def _generate(model: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    rows = 1 if "prompt_lookup_num_tokens" in arguments else 2
    inputs = _inputs(rows, left=_is_decoder_only(model))
    return (model.generate(**inputs, **arguments, max_new_tokens=4),)


def _continued(model: Any) -> tuple[torch.Tensor, ...]:
    """Two tokens, the logits of a further one by ``forward``, and two more by ``generate``."""
    side, source = "decoder_", _inputs()
    prompt = source
    if _is_decoder_only(model):
        side, source, prompt = "", {}, _inputs(1)
    first = model.generate(
        **prompt, min_new_tokens=2, max_new_tokens=2, return_dict_in_generate=True
    )
    tokens, kept = first.sequences, {contract.CACHE: first[contract.CACHE]}
    new = {f"{side}input_ids": tokens[:, -1:]}
    step = model(**source, **new, **kept, use_cache=True)
    tokens = torch.cat((tokens, step.logits[:, -1:].argmax(-1)), dim=1)
    kept = {contract.CACHE: step[contract.CACHE]}
    whole = {f"{side}input_ids": tokens, f"{side}attention_mask": torch.ones_like(tokens)}
    further = model.generate(**source, **whole, **kept, max_new_tokens=2)
    return step.logits, further
