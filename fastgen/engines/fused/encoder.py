"""The engine of an encoder over packed tokens: what padding there is, nobody computes."""

from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from importlib.resources import files
from types import MappingProxyType
from typing import Any, cast

import torch

from fastgen import cuda
from fastgen.engine_cache import EngineCache
from fastgen.engines import NotFused, nvrtc
from fastgen.engines.fused.packed_described import Ids, Visible
from fastgen.engines.fused.packed_int8 import Int8Product
from fastgen.engines.fused.packed_integers import LEAST_ROWS
from fastgen.engines.fused.packed_kernels import Kernel
from fastgen.engines.fused.packed_ops import PackedOps
from fastgen.engines.fused.packed_places import Count, Place, Spread
from fastgen.engines.fused.packed_plan import allocate, fetch_ahead
from fastgen.engines.fused.packed_products import Together
from fastgen.engines.fused.packed_values import Buffer, Call, Size
from fastgen.engines.fused.packed_weights import Scratch
from fastgen.engines.fused.recorder import Narrow
from fastgen.target import Target

MOST_TOKENS = 16384
"""Tokens of one run: enough to fill a GPU, and all that buffers must hold."""
SIDE_TOKENS, FETCHED_TOKENS = 2048, 512
_SOURCES = ("common.cu", "tiles.cu", "encoder_rows.cu", "encoder.cu")


def _shapes(target: Target, held: Mapping[str, Narrow]) -> dict[str, torch.Tensor]:
    """Tensors without numbers of the shapes of a checkpoint's weights in fewer bits.

    Raises:
        NotFused: products of packed tokens read other weights.
    """
    if target.weights != "int8":
        raise NotFused(
            "packed tokens are multiplied by a checkpoint's weights as integers of 8 bits, which "
            "EngineOptions(weights='int8') asks for"
        )
    for name, weight in held.items():
        if not weight.form.by_rows:
            raise NotFused(f"{name}: integers in groups of {weight.form.group} or with zeros")
    return {n: torch.empty(w.shape, dtype=torch.int8, device="meta") for n, w in held.items()}


class PackedEngine:
    """An encoder over the model's own parameters, as the launches of its packed tokens."""

    def __init__(
        self,
        root: Any,
        target: Target,
        device: torch.device,
        parameters: Mapping[str, torch.Tensor],
        padding: bool,
        more_ids: Sequence[str] = (),
        engine_cache: EngineCache | None = None,
        held: Mapping[str, Narrow] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            root: the family's graph module with a method ``encode``.
            parameters: the model's by name, which must stay alive and in place, and what is made
                of them by the names of ``blockwise.Format``.
            padding: whether tokens that the mask hides are computed.
            more_ids: names of what the family reads beside token ids, one for each.
            engine_cache: where compiled kernels are kept; None compiles them in every process.
            held: which of them a checkpoint has in fewer bits.

        Raises:
            NotFused: the GPU or the family is not served.
        """
        # on a CPU torch computes what the kernels would
        if device.type == "cuda" and (reason := nvrtc.refusal(device)):
            raise NotFused(reason)
        if held:
            own = cast(MutableMapping[str, torch.Tensor], parameters)  # nothing is written there
            parameters = ChainMap(_shapes(target, held), own)
        self.target, self.device, self._padding = target, device, padding
        self._root, self._more_ids, self._engine_cache = root, more_ids, engine_cache
        self._dtype = getattr(torch, target.dtype)
        for name, parameter in root.named_parameters():
            parameter.name, parameter._realized = name, True  # onnxscript would rename it
            if name not in parameters:
                raise NotFused(f"{name} is gone")
        self._parameters = parameters
        self._scratch: dict[tuple[int, torch.dtype, int], torch.Tensor] = {}
        self._matrices = Scratch(self._dtype)
        self._read = self._record()[0].read  # what is not served is known by now, too
        self._count, self._place = Count(), Place()
        compile_kernels((self._count, self._place), self._dtype, device, engine_cache)

    def weight_pointers(self) -> dict[str, int]:
        """Of the parameters that are read as they are."""
        return {name: p.data_ptr() for name, p in self._read.items()}

    def call(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        hidden: torch.Tensor,
        **more: torch.Tensor | int,
    ) -> Call:
        """A call of token ids [B, S], whose results ``hidden`` [B, S, E] takes; queued is the count
        of its tokens.

        Args:
            more: other ids of each token, or 0 for all of them.
        """
        batch, sources = input_ids.shape
        given = {name: v if isinstance(v, torch.Tensor) else None for name, v in more.items()}
        given["input_ids"] = input_ids

        def empty(*axes: int) -> torch.Tensor:
            return torch.empty(axes, dtype=torch.int32, device=self.device)

        ids = {n: None if v is None else v.to(self.device, torch.int64) for n, v in given.items()}
        call = Call(
            ids={n: None if v is None else v.contiguous() for n, v in ids.items()},
            mask=None if mask is None else (mask != 0).to(self.device, torch.int64).contiguous(),
            hidden=hidden,
            lengths=empty(batch),
            visible=empty(batch),
            tokens=empty(batch * sources),
            rows=empty(batch, sources),
            padding=self._padding,
        )
        self._count(call)
        return call

    def bind(self, tokens: int, rows: int) -> "PackedBinding":
        """Record and compile the launches over buffers of so many tokens in so many rows. Bindings
        share their scratch: they run one after the other."""
        self._matrices.on(self.device)
        ops, result = self._record()
        taken: Counter[tuple[int, torch.dtype]] = Counter()
        least = max(tokens, LEAST_ROWS)

        def make(width: int, dtype: torch.dtype | None) -> torch.Tensor:
            kind = width, dtype or self._dtype
            place = *kind, taken[kind]
            taken[kind] += 1
            found = self._scratch.get(place)
            if found is None or len(found) < least:
                axes = 1 << (least - 1).bit_length(), width
                found = torch.zeros(axes, dtype=kind[1], device=self.device)
                self._scratch[place] = found
            return found[:least]

        binding = PackedBinding(ops, result, self._place, make, tokens, rows)
        compile_kernels(binding.kernels(), self._dtype, self.device, self._engine_cache)
        return binding

    def _record(self) -> tuple[PackedOps, Buffer]:
        ops = PackedOps(self.target, self._parameters, self._matrices)
        names = "input_ids", *self._more_ids
        results = self._root.encode(
            ops,
            **{name: Ids(name) for name in names},
            query_positions=None,
            key_positions=Ids(None),
            attention_mask=Visible(),
        )
        result = ops.rows(results["last_hidden_state"])
        if ops.embed is None:
            raise NotFused("an encoder that does not begin with normed embeddings")
        return ops, result


def compile_kernels(
    kernels: Sequence[Kernel],
    dtype: torch.dtype,
    device: torch.device,
    engine_cache: EngineCache | None = None,
) -> None:
    """Make kernels ready to be launched, each instantiation compiled once; on a CPU torch computes
    them."""
    if device.type != "cuda":
        return
    names: dict[str, str] = {}
    lines = [f"#define T {nvrtc.ELEMENTS[dtype]}", "#define ROWS 1", "#define QUERIES 1"]
    needed = (name for kernel in kernels for name in (*kernel.behind, kernel.source))
    sources = dict.fromkeys((*_SOURCES, *needed))
    lines += [files("fastgen.engines.fused").joinpath(n).read_text() for n in sources]
    for kernel in kernels:
        body = kernel.body
        if body not in names:
            names[body] = f"{body.split('<')[0]}_{len(names)}"
            parameter = f"const __grid_constant__ {type(kernel.arguments).__name__} args"
            bounds = f"__launch_bounds__({kernel.threads}{', 1' if kernel.alone else ''})"
            head = f'extern "C" __global__ void {bounds} {names[body]}({parameter})'
            lines.append(f"{head} {{ {body}(args); }}")
    program = nvrtc.program("\n".join(lines), device, engine_cache)
    for kernel in kernels:
        kernel.prepare(program, names[kernel.body])


class PackedBinding:
    """The launches of an encoder over buffers of one size."""

    def __init__(
        self,
        ops: PackedOps,
        result: Buffer,
        place: Place,
        make: Callable[[int, torch.dtype | None], torch.Tensor],
        tokens: int,
        rows: int,
    ) -> None:
        """
        Args:
            make: scratch of so many columns of a dtype; None is that of activations.
            tokens, rows: the most that a call may have.
        """
        assert ops.embed is not None
        self.tokens, self.rows = tokens, rows
        self.launches = ops.launches
        self._launches = allocate(ops.launches, make, kept=(*ops.embed.writes, result))
        self._fetches = fetch_ahead(ops.launches)
        self._place, self._embed, self._spread = place, ops.embed, Spread(result)
        counts = result.tensor.new_zeros(2 * rows + 1, dtype=torch.int32)
        self._starts, self._keys = counts[: rows + 1], counts[rows + 1 :]
        self._columns = counts.new_zeros(tokens) if ops.reads_columns else None

    def kernels(self) -> list[Kernel]:
        """All of its own that have to be compiled."""
        kernels: list[Kernel] = [self._embed, self._spread, *self._fetches]
        for each in self._launches:
            for launch in each.launches if isinstance(each, Together) else [each]:
                if isinstance(launch, Int8Product):
                    kernels += launch.kernels.values()
                elif isinstance(launch, Kernel):
                    kernels.append(launch)
        return kernels

    def size(self, tokens: int, rows: int, longest: int, even: bool = False) -> Size:
        """So many tokens in so many rows, of which no row has more than the longest, and if
        ``even`` none fewer."""
        starts, keys = self._starts[: rows + 1], self._keys[:rows]
        return Size(tokens, longest, starts, keys, even, columns=self._columns)

    def layers(self, size: Size, side: Sequence[cuda.Side] = ()) -> Callable[[], None]:
        """What queues all launches between reading a call and spreading its results.

        Args:
            side: streams beside the current one; if there are three, the last fetches weights.
        """
        fetching = side[2] if len(side) > 2 else None
        size = replace(size, side=side[:2], fetching=fetching)

        def run() -> None:
            for launch in self._launches:
                launch(size)
            if fetching is not None and self._fetches:
                torch.cuda.current_stream().wait_stream(fetching)

        return run

    def run(self, call: Call, size: Size, layers: Callable[[], None] | None = None) -> None:
        """Queue a call on torch's current stream.

        Args:
            layers: what runs the layers over buffers of this size, if they were captured.
        """
        self._place(call, size)
        self._embed(call, size)
        (layers or self.layers(size))()
        self._spread(call)


def pieces(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Shares of rows of such lengths, from, to and tokens: each as many as there should be in one
    run, and about as many as in the others."""
    share = sum(lengths) / -(-sum(lengths) // MOST_TOKENS)
    start, tokens = 0, 0
    for row, length in enumerate(lengths):
        if row > start and (tokens + length > MOST_TOKENS or tokens >= share):
            yield start, row, tokens
            start, tokens = row, 0
        tokens += length
    yield start, len(lengths), tokens


def side_streams(device: torch.device, tokens: int) -> list[cuda.Side]:
    """Streams beside the engine's on a GPU, for products of few tokens, which leave most of its
    processors idle; and one that fetches weights, for fewer, which wait for them."""
    if device.type != "cuda" or tokens > SIDE_TOKENS:
        return []
    return cuda.side_streams(device, 3 if tokens <= FETCHED_TOKENS else 2)
