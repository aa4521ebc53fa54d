"""A pass of a whole model through the reference vocabulary: what its engines compute of a batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fastgen.errors import FastgenError
from fastgen.graphs.shape import LAST_STATE
from fastgen.hf.module import EngineModule
from fastgen.hf.weights import tensors_of
from fastgen.ops.reference import Known, ReferenceOps, Seen
from fastgen.target import onnxruntime_cuda
from fastgen.tasks.causal import FastCausalLM
from fastgen.tasks.decoder import FastDecoder
from fastgen.tasks.encoder import FastEncoder
from fastgen.tasks.seq2seq import FastSeq2SeqLM

Batch = Mapping[str, torch.Tensor]
_SIZES = (4, 24), (1, 160)  # rows and tokens of random batches
_NEW_TOKENS = 32  # that a decoder is given of what it decodes itself


@dataclass(frozen=True)
class Part:
    """A module with graphs of its own; ``path`` leads to it, with a dot behind it."""

    path: str
    module: Any

    def local(self, names: Iterable[str]) -> tuple[str, ...]:
        """Its own names among those of the whole model."""
        path = self.path
        return tuple(sorted(n.removeprefix(path) for n in names if n.startswith(path)))

    def whole(self, x: Known) -> Known:
        """A value of its graphs, by the name of what gave it in the whole model."""
        return replace(x, name=self.path + x.name if x.name else "")


ENCODED = "encoded"
"""The encoder's hidden states, among results."""
Watch = Callable[[str, Seen], None]
"""Told of the path of a part, and of one of its operations."""


class Passes:
    """Runs a model over batches, by the operations that are chosen to be float32."""

    def __init__(self, model: Any, batches: Iterable[Batch]) -> None:
        """
        Raises:
            FastgenError: the model is not of a Fast class, or no engine has graphs of it; or a
                batch holds no tokens.
        """
        if not isinstance(model, EngineModule):
            kind = type(model).__name__
            raise FastgenError(
                f"{kind} is no Fast class: load it as Fast{kind}, or by FastAutoModel."
            )
        self._model = model
        found = [Part(f"{n}." if n else "", m) for n, m in model.named_modules()]
        self.encoder = next((p for p in found if isinstance(p.module, FastEncoder)), None)
        wholes = [p for p in found if isinstance(p.module, FastSeq2SeqLM | FastCausalLM)]
        stacks = [p for p in found if isinstance(p.module, FastDecoder)]
        self.decoder = next(iter([*wholes, *stacks]), None)
        if self.encoder is None and self.decoder is None:
            raise FastgenError(f"{type(model).__qualname__} has no stack that an engine runs.")
        self.parts = [p for p in (self.encoder, *wholes, *stacks) if p is not None]
        self.batches = [self._complete(batch) for batch in batches]

    def run(
        self,
        chosen: Iterable[str] | None,
        watch: Watch | None = None,
        rounded: bool = False,
        clamped: bool = True,
    ) -> Iterator[dict[str, Known]]:
        """What each batch gives: ``ENCODED``, hidden states, and a decoder's results.

        Args:
            chosen: what is float32; None: what the rules say.
            watch, rounded, clamped: see ``ReferenceOps``.
        """
        names = None if chosen is None else [*chosen]

        def ops(part: Part) -> ReferenceOps:
            wide = None if names is None else part.local(names)
            target = replace(onnxruntime_cuda("float16"), wide=wide)
            told = None if watch is None else partial(watch, part.path)
            return ReferenceOps(target, tensors_of(part.module), told, rounded, clamped)

        for batch in self.batches:
            with torch.inference_mode():
                results = self._pass(batch, ops)
            yield results

    def _pass(self, batch: Batch, ops: Callable[[Part], ReferenceOps]) -> dict[str, Known]:
        results: dict[str, Known] = {}
        if (part := self.encoder) is not None:
            results[ENCODED] = part.whole(_encode(part.module, batch, ops(part)))
        if (part := self.decoder) is not None:
            decoded = _decode(part.module, batch, ops(part), results.get(ENCODED))
            results |= {name: part.whole(x) for name, x in decoded.items()}
        return results

    def _complete(self, batch: Batch) -> Batch:
        """With all that the stacks read, on the model's device."""
        device = self._model.device
        full = {n: t.to(device) for n, t in batch.items() if isinstance(t, torch.Tensor)}
        if "input_ids" not in full or not full["input_ids"].numel():
            raise FastgenError(
                f"a batch of {sorted(full)} holds no token ids: input_ids must be an int64 tensor "
                "[B, S] with a token at least (does the checkpoint have a tokenizer?)."
            )
        full.setdefault("attention_mask", torch.ones_like(full["input_ids"]))
        reads = self.encoder is not None and self.decoder is not None
        if reads and "decoder_input_ids" not in full:
            full["decoder_input_ids"] = self._decoded(full)
        return full

    def _decoded(self, batch: Batch) -> torch.Tensor:
        """What a program would have a decoder read: the model's own tokens, or the encoder's."""
        shift = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
        if "labels" in batch and shift is not None:
            labels = batch["labels"]
            found: torch.Tensor = shift(
                labels.masked_fill(labels < 0, self._model.config.pad_token_id)
            )
            return found
        if not isinstance(self._model, FastSeq2SeqLM):
            return batch["input_ids"]
        inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
        tokens: torch.Tensor = self._model.generate(**inputs, max_new_tokens=_NEW_TOKENS)
        return tokens


def random_batches(config: Any, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random token ids, of several short rows and of a long one."""
    generator = torch.Generator().manual_seed(seed)
    names = ("max_position_embeddings", "n_positions")
    known = [n for name in names if isinstance(n := getattr(config, name, None), int)]
    batches = []
    for rows, tokens in _SIZES:
        shape = rows, min([tokens, *known])
        ids = [torch.randint(config.vocab_size, shape, generator=generator) for _ in range(2)]
        batches.append({"input_ids": ids[0], "decoder_input_ids": ids[1]})
    return batches


def _named(root: Any) -> Any:
    for name, parameter in root.named_parameters():
        parameter.name, parameter._realized = name, True  # onnxscript would rename it
    return root


def _encode(module: Any, batch: Batch, ops: ReferenceOps) -> Known:
    ids = batch["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device)
    more = {n: batch.get(n, torch.zeros_like(ids)) for n in module._more_ids}
    results = _named(module._encoder_root()).encode(
        ops,
        input_ids=ids,
        attention_mask=batch["attention_mask"],
        query_positions=positions[:, None],
        key_positions=positions[None],
        **more,
    )
    found: Known = results[LAST_STATE]
    return found


def _decode(
    module: Any, batch: Batch, ops: ReferenceOps, encoded: Known | None
) -> dict[str, Known]:
    """All tokens of a batch at once, over KV slots that hold nothing before them."""
    root = _named(module._decoder_root())
    shape, mask = root.shape, batch["attention_mask"]
    ids = batch["decoder_input_ids" if shape.source else "input_ids"]
    rows, tokens = ids.shape
    positions = torch.arange(tokens, device=ids.device)
    inputs: dict[str, Any] = {}
    if shape.source:
        assert encoded is not None
        inputs = root.cross(ops, Known(encoded.tensor), mask)
        given = {n: x for n, x in inputs.items() if n.startswith("cross_")}
        inputs = {n: Known(x.tensor) for n, x in inputs.items()}
    else:
        given, starts = {}, (mask != 0).to(torch.int64).argmax(1, keepdim=True)
        inputs["row_start"] = starts
    if shape.vocab_size is not None:
        inputs["kept"] = positions
    width = shape.stored_heads * shape.head_size
    empty = Known(torch.zeros(rows, tokens, width, device=ids.device))
    results = root.decode(
        ops,
        input_ids=ids,
        query_positions=positions[:, None],
        slot_positions=positions[None],
        first_slot=torch.zeros(rows, dtype=torch.int64),
        **dict.fromkeys(shape.kv_names("self"), empty),
        **inputs,
    )
    return given | {n: x for n, x in results.items() if not n.startswith("hidden_state.")}
