"""The vocabulary of ``fastgen/ops`` as launches of fused CUDA kernels: five to eight a layer.

Family code runs through ``FusedOps`` unchanged, over torch tensors. It is lazy: norms, products and
activations stay descriptions until something needs their numbers, and then become one launch with
all that can be part of it.
"""

from dataclasses import replace
from typing import Any

import torch

from fastgen.engines import NotFused
from fastgen.engines.fused.products import ACTIVATIONS, STATIC_SHARED
from fastgen.engines.fused.rotary import Factor, Rotary, Turn
from fastgen.engines.fused.values import (
    Activated,
    AttentionArgs,
    Embedded,
    EmbeddingArgs,
    Normed,
    Part,
    Placed,
    Positions,
    Product,
    Residual,
    pointer,
)
from fastgen.engines.fused.wide_attention import Wide, choose
from fastgen.ops import names
from fastgen.ops.values import Bias, KVSlots

MAX_SLOTS = 8192  # a block keeps the bias of its slots in shared memory
MAX_HEAD_SIZE = 256


def head_size_served(head_size: int) -> bool:
    """Whether the attention kernels serve heads of this size."""
    return 16 <= head_size <= MAX_HEAD_SIZE and head_size % 8 == 0


class FusedOps(Rotary):
    """Records the launches of one step; the methods are those of ``ops.Ops``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._embedded: dict[Embedded, Residual] = {}

    def __getattr__(self, name: str) -> Any:
        raise NotFused(f"operation {name!r}")

    # Attention kernels

    def _attention(
        self,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: int,
        group: int = 1,
        turn: Turn | None = None,
        **args: Any,
    ) -> torch.Tensor:
        """Launch attention of ``q`` [rows, stride] over KV buffers [B, slots, H / group * D]."""
        slots, width = key.shape[1], key.shape[2] * group
        head_size = width // heads
        if not head_size_served(head_size) or slots > MAX_SLOTS:
            most = f"16 to {MAX_HEAD_SIZE} by 8, {MAX_SLOTS} slots"
            raise NotFused(f"head size {head_size}, {slots} slots: fused kernels serve {most}")
        y = self._buffer("attended", width)
        arguments = AttentionArgs(
            q=q.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            y=y.data_ptr(),
            heads=heads,
            slots=slots,
            stride=q.shape[1],
            queries=self._queries,
            **args,
        )
        turn = turn or Turn()
        arguments.turn = turn.args
        own = "first_slot" in args
        masked = own and args["mask"] is not None
        self._launch_attention(arguments, head_size, group, turn.kind, own, masked)
        return y

    def _launch_attention(
        self, args: AttentionArgs, head_size: int, group: int, turn: str, own: bool, masked: bool
    ) -> None:
        if wide := self._wide(args, head_size, group, turn, own, masked):
            self._launch(
                *(wide.body, wide.grid, wide.threads, args, wide.blocks_together),
                shared_bytes=wide.shared_bytes,
                cluster=wide.splits,
            )
            return
        slots, seen = args.slots, args.slots  # seen: of each query
        if masked:
            seen = -(-slots // self._queries)  # of beams
        own_heads = self._heads_together(args.heads, group, seen)
        blocks = args.heads // own_heads
        splits = self._splits(seen, blocks)
        share = -(-slots // splits)
        queries = self._queries_together(blocks, splits, min(4 // own_heads, MAX_SLOTS // share))
        together = own_heads * queries
        shared_bytes = 4 * share * queries
        if masked := masked and shared_bytes + 2 * share <= 4 * MAX_SLOTS:
            shared_bytes += 2 * share
        grid = blocks * splits, self._rows // queries
        early = grid[0] * grid[1] <= self._processors  # more blocks hide each other's loads
        most = 64 if splits > 1 else 128  # only what is filled is shared out: shares are full
        most = most if early else 256
        warps, unroll = self._attention_block(head_size, blocks, together, seen > most * splits)
        parts = warps + (together * splits if splits > 1 else 1)
        fixed = 4 * (head_size + 2) * parts
        if turn != "AS_IS":  # the new keys and their angles
            fixed += self._queries * head_size * (4 + self._dtype.itemsize)
        if shared_bytes + fixed > STATIC_SHARED - 256:
            raise NotFused(
                f"heads of {head_size}, {slots} slots: more than a block's shared memory"
            )
        sizes = f"{head_size}, {warps}, {splits}, {unroll}, {queries}"
        kind = ", ".join(str(flag).lower() for flag in (own, masked, early))
        if group > 1 or turn != "AS_IS":
            kind += f", {group}, {own_heads}, {turn}"
        self._launch(
            *(f"attention<{sizes}, {kind}>", grid, 32 * warps, args),
            shared_bytes=shared_bytes,
            cluster=splits,
        )

    def _wide(
        self, args: AttentionArgs, head_size: int, group: int, turn: str, own: bool, masked: bool
    ) -> Wide | None:
        """The launch for many rows or long buffers, where it is to serve."""
        if not isinstance(self.query_count, int):
            return None  # a prompt, whose length the kernel would have to know
        sizes = head_size, self._rows, self._queries, args.heads, group, args.slots
        clusters = torch.cuda.get_device_capability(self.device) >= (9, 0)
        wide = Wide(*sizes, own, masked, turn)
        return choose(self._dtype, wide, self._processors, clusters)

    def _splits(self, slots: int, heads: int) -> int:
        """Blocks that share out a row's slots: each at least 128, and not three a processor."""
        if torch.cuda.get_device_capability(self.device) < (9, 0):
            return 1  # clusters begin there
        for splits in (8, 4, 2):
            if slots >= 128 * splits and heads * self._rows * splits <= 2 * self._processors:
                return splits
        return 1

    def _heads_together(self, heads: int, group: int, slots: int) -> int:
        """Query heads of one block, which reads the keys and values of their group once: several,
        if that leaves most processors a block."""
        for together in (4, 3, 2):
            blocks = heads // together
            all_blocks = blocks * self._rows * self._splits(slots, blocks)
            if group % together == 0 and 4 * all_blocks >= 3 * self._processors:
                return together
        return 1

    def _queries_together(self, heads: int, splits: int, most: int) -> int:
        """Queries of one block, which reads their common keys and values once: several of a row's,
        if that leaves every processor a block.

        Args:
            heads: blocks of one query and split.
            most: how many queries' sums fit a block.
        """
        if splits > 1 or heads * self._batch < self._processors:
            return 1
        return max(n for n in range(1, most + 1) if self._queries % n == 0)

    def _attention_block(
        self, head_size: int, heads: int, queries: int, many: bool
    ) -> tuple[int, int]:
        """Warps of a block, whose slots may be ``many``, and slots of each at a time; the measured
        best."""
        if queries == 1:
            return min(max(4, head_size // 8), 16), 4 if many else 2
        least = -(-head_size // 32)  # a thread for each element of the result
        return max(least, 4 if heads * self._batch >= 3 * self._processors else 8), 2

    # The vocabulary: embeddings

    def row_positions(
        self, query_positions: torch.Tensor, row_start: torch.Tensor | None
    ) -> Positions:
        return Positions(query_positions, row_start)

    def embedding(
        self, ids: torch.Tensor | Positions, weight: Any, scale: float = 1.0, offset: int = 0
    ) -> Embedded | Placed:
        table = self._narrow(weight)
        if isinstance(ids, Positions):
            if scale != 1.0:
                raise NotFused("scaled rows by position")
            return Placed(ids, table, offset)
        if offset:
            raise NotFused("token ids with an offset")
        return Embedded(ids, table, scale)

    def _as_residual(self, x: Embedded | Residual) -> Residual:
        """The residual stream that ``x`` is, or starts."""
        if isinstance(x, Residual):
            return x
        if x not in self._embedded:
            self._embedded[x] = self._embed(x)
        return self._embedded[x]

    def _embed(self, x: Embedded) -> Residual:
        residual, places = self._stream(x.weight.shape[1]), x.places
        args = EmbeddingArgs(
            ids=x.ids.data_ptr(),
            weight=x.weight.data_ptr(),
            residual=residual.tensor.data_ptr(),
            scale=x.scale,
            width=x.weight.shape[1],
            queries=self._queries,
        )
        if places is not None:
            args.places, args.offset = places.weight.data_ptr(), places.offset
            args.known = len(places.weight)
            args.positions = places.positions.places.data_ptr()
            args.row_start = pointer(places.positions.row_start)
        self._launch("embedding", (self._rows, 1), 256, args)
        return residual

    def add(self, x: Embedded, y: Placed) -> Embedded:
        if not isinstance(x, Embedded) or x.places is not None or not isinstance(y, Placed):
            raise NotFused("a sum that is not of tokens' and positions' rows")
        return replace(x, places=y)

    # Norms

    def rms_norm(self, x: Embedded | Residual, weight: Any, eps: float) -> Normed:
        self._rounds(names.of_parameter(weight))
        return Normed(self._as_residual(x), self._narrow(weight), None, eps)

    def add_rms_norm(
        self, residual: Embedded | Residual, x: Product, weight: Any, eps: float
    ) -> tuple[Residual, Normed]:
        total = self._added(residual, x)
        return total, self.rms_norm(total, weight, eps)

    def layer_norm(self, x: Embedded | Residual, weight: Any, bias: Any, eps: float) -> Normed:
        self._rounds(names.of_parameter(weight))
        return Normed(self._as_residual(x), self._narrow(weight), self._narrow(bias), eps)

    def add_layer_norm(
        self, residual: Embedded | Residual | Normed, x: Product, weight: Any, bias: Any, eps: float
    ) -> tuple[Residual, Normed]:
        total = self._added(residual, x)
        return total, self.layer_norm(total, weight, bias, eps)

    def _added(self, residual: Embedded | Residual | Normed, x: Product) -> Residual:
        if isinstance(residual, Normed):
            return self._add(self._as_stream(residual), x)
        return self._add(self._as_residual(residual), x)

    def as_residual(self, x: Any) -> Any:
        return x

    # Products

    def linear(
        self,
        x: Normed | Activated | torch.Tensor,
        weight: Any,
        bias: Any = None,
        scale: float = 1.0,
        transposed: bool = False,
    ) -> Product:
        if isinstance(x, Activated):
            products = [x.product] if x.gate is None else [x.product, x.gate]
            hidden = self._buffer("hidden", products[0].sizes[1])
            self._linear(hidden, products, "GATE" if x.gate else "ACTIVATE", x.activation)
            x = hidden
        matrix = self._matrix(weight, transposed)
        vector = None if bias is None else self._parameter(bias)
        own = matrix.values.dtype if matrix.blocks is None else self._dtype
        if vector is not None and (vector.dtype != own or not vector.is_contiguous()):
            raise NotFused(f"{bias.name} in {vector.dtype}, its product in {own}")
        name = names.of_parameter(weight)
        self._rounds(names.product(name))
        return Product(x, matrix, scale, vector, name)

    def wide_linear(self, x: Normed | Activated | torch.Tensor, weight: Any) -> Product:
        return self.linear(x, weight)  # sums stay in float32 until they meet the residual stream

    def split(self, x: Product, parts: int) -> list[Part]:
        return [Part(x, i, parts) for i in range(parts)]

    def rows_kept(self, x: Any, kept: torch.Tensor) -> Any:
        return x  # a step keeps all of its query tokens

    def activation(self, x: Product, name: str) -> Activated:
        if name not in ACTIVATIONS:
            raise NotFused(f"activation {name!r}: one of {sorted(ACTIVATIONS)}")
        self._rounds(x.name, names.activation(x.name))
        return Activated(x, name)

    def multiply(self, x: Activated, y: Product) -> Activated:
        if x.gate is not None or y.x is not x.product.x:
            raise NotFused("a gate that is not a second product of the same input")
        self._rounds(y.name, names.multiply(x.product.name))
        return replace(x, gate=y)

    # Attention

    def attention(
        self,
        q: Product,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        heads: int,
        scale: float = 1.0,
    ) -> torch.Tensor:
        if bias is None or tuple(bias.shape) != (self._batch, 1, self._queries, k.shape[1]):
            raise NotFused("attention with another bias than a mask over sources")
        self._rounds(q.name, names.attention(q.name))
        query = self._buffer("query", q.sizes[1])
        self._linear(query, [q], "STORE")
        return self._attention(query, k, v, heads, mask=bias.data_ptr(), scale=scale)

    def cached_attention(
        self,
        q: Factor,
        k: Factor,
        v: Product | Part,
        slots: KVSlots,
        bias: Bias,
        heads: int,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, turn = self._query_key_value(q, k, v, heads, slots, bias)
        attended = self._attention(
            *(rows, slots.key, slots.value, heads),
            group=1 if slots.groups is None else slots.groups.size,
            table=pointer(bias.table),
            mask=pointer(bias.mask),
            query_positions=bias.query_positions.data_ptr(),
            slot_positions=bias.slot_positions.data_ptr(),
            first_slot=slots.first_slot.data_ptr(),
            row_start=pointer(bias.row_start),
            span=0 if bias.table is None else bias.table.shape[-1],
            reach=bias.reach,
            scale=scale,
            turn=turn,
        )
        return attended, slots.key, slots.value

    def _query_key_value(
        self, q: Factor, k: Factor, v: Product | Part, heads: int, slots: KVSlots, bias: Bias
    ) -> tuple[torch.Tensor, Turn]:
        """Launch the products of attention, side by side; and the turn of queries and keys that
        attention has to do itself."""
        query, key, turn = self._unturned(q, k)
        products = _side_by_side(query, key, v)
        self._rounds(*(p.name for p in products), names.attention(products[0].name))
        rows = self._buffer("query, key, value", sum(p.sizes[1] for p in products))
        self._linear(rows, products, "STORE")
        if turn.angles is None or self._turns_inside():
            return rows, turn
        keys = heads if slots.groups is None else slots.groups.count
        self._turn_rows(rows, heads, keys, turn, bias)
        return rows, Turn()

    def store(self, x: Product, y: torch.Tensor) -> None:
        """Give the step's result ``x`` in the tensor ``y`` [B, Q, outputs]."""
        self._linear(y, [x], "STORE")


def _side_by_side(q: Product | Part, k: Product | Part, v: Product | Part) -> list[Product]:
    """The products that give query, key and value next to each other."""
    if isinstance(q, Part) and isinstance(k, Part) and isinstance(v, Part):
        parts = [(part.product, part.index, part.count) for part in (q, k, v)]
        if parts == [(q.product, index, 3) for index in range(3)]:
            return [q.product]
    if isinstance(q, Product) and isinstance(k, Product) and isinstance(v, Product):
        products = [q, k, v]
        if all(product.x is q.x for product in products):
            return products
    raise NotFused("query, key and value are products of different inputs")
