"""The KV cache: device buffers in buckets, leased to caches that Hugging Face code understands."""

import copy
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from fastgen.capturing import lasting
from fastgen.hf import contract
from fastgen.leases import BucketPool, Lease
from fastgen.seq2seq import DecoderShape
from fastgen.target import Target


class BucketSize(NamedTuple):
    """What one set of buffers, bindings and captured CUDA graph serves."""

    batch: int
    queries: int
    """Query tokens of one step: 1, or the number of beams that share one KV buffer."""
    slots: int
    """KV cache slots per row (a multiple of ``queries``)."""
    sources: int
    """Source tokens per row, padding included."""


class Bucket:
    """Every tensor of the decoder graph at one size, allocated once.

    ``tensors`` maps graph names to tensors. ``self_kv`` and ``cross_kv`` hold all layers' buffers
    in one allocation each: [2 * layers, *Target.kv_shape], keys and values alternating.
    """

    def __init__(
        self, shape: DecoderShape, target: Target, device: torch.device, size: BucketSize
    ) -> None:
        self.shape, self.target, self.device, self.size = shape, target, device, size
        self.dtype = getattr(torch, target.dtype)
        batch, queries, slots, sources = size
        kv = 2 * shape.layers
        self.self_kv = self._empty(kv, *target.kv_shape(batch, *self._heads(slots)))
        self.cross_kv = self._empty(kv, *target.kv_shape(batch, *self._heads(sources)))
        self.tensors = {
            "input_ids": torch.zeros(batch, queries, dtype=torch.int64, device=device),
            "slot_positions": (torch.arange(slots, device=device) // queries).view(1, slots),
            **self._counters(batch, queries),
            "cross_mask": self._empty(batch, 1, queries, sources),
        }
        self.output(*shape.output)
        if queries > 1 or target.always_masked:  # zero until beams say what hides what
            self.tensors["slot_mask"] = self._empty(batch, 1, queries, slots).zero_()
        self.tensors |= {name: self._empty(*axes) for name, axes in shape.tables.items()}
        self.tensors |= self._kv_tensors("self", self.self_kv)
        self.tensors |= self._kv_tensors("present", self.self_kv)  # updated in place
        self.tensors |= self._kv_tensors("cross", self.cross_kv)
        self.steps: dict[Any, Any] = {}
        """Captured graphs of these buffers, by whatever made them."""
        self.bindings: dict[Any, Any] = {}
        """What runs engines over these buffers, likewise."""

    def output(self, name: str, width: int) -> torch.Tensor:
        """What a step writes, [B, Q, width]: made on first use, as a cache may go from a decoder
        with a head to one without."""
        if name not in self.tensors:
            with lasting():
                self.tensors[name] = self._empty(self.size.batch, self.size.queries, width)
        return self.tensors[name]

    def without_steps(self) -> "Bucket":
        """The same buffers for what a step itself keeps: with the steps, nothing would be freed."""
        same = copy.copy(self)
        same.steps, same.bindings = {}, {}
        return same

    def _counters(self, batch: int, queries: int) -> dict[str, torch.Tensor]:
        """Where the next query tokens stand. On a GPU one tensor, so that one kernel moves on."""
        if self.target.appends_in_attention:
            first_slot = torch.zeros(1, dtype=torch.int32, device=self.device)
            positions = torch.zeros(queries, 1, dtype=torch.int64, device=self.device)
            return {"query_positions": positions, "first_slot": first_slot}
        slot = -(-queries // 32) * 32  # TensorRT wants tensors to begin at multiples of 256 bytes
        self._counts = torch.zeros(slot + batch, dtype=torch.int64, device=self.device)
        steps = [1] * slot + [queries] * batch
        self._steps = torch.tensor(steps, dtype=torch.int64, device=self.device)
        positions, first_slot = self._counts[:queries], self._counts[slot:]
        return {"query_positions": positions[:, None], "first_slot": first_slot}

    def seek(self, length: int) -> None:
        """Let the next query tokens follow ``length`` tokens."""
        self.tensors["query_positions"].fill_(length)
        self.tensors["first_slot"].fill_(length * self.size.queries)

    def advance(self) -> None:
        """Let the next query tokens follow one token more; queued on the device."""
        if self.target.appends_in_attention:
            self.tensors["query_positions"].add_(1)
            self.tensors["first_slot"].add_(self.size.queries)
        else:
            self._counts.add_(self._steps)

    def mutable(self) -> list[torch.Tensor]:
        """What a step changes besides the KV buffers, whose slot it only writes again."""
        return [self.tensors[name] for name in ("input_ids", "query_positions", "first_slot")]

    def _heads(self, slots: int) -> tuple[int, int, int]:
        return self.shape.heads, slots, self.shape.head_size

    def _empty(self, *axes: int) -> torch.Tensor:
        return torch.empty(axes, dtype=self.dtype, device=self.device)

    def _kv_tensors(self, prefix: str, buffers: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.target.kv_layout == "BLHD":
            buffers = buffers.flatten(-2)
        return dict(zip(self.shape.kv_names(prefix), buffers.unbind(0), strict=True))

    def layer(self, buffers: torch.Tensor, index: int, length: int) -> torch.Tensor:
        """One buffer's first ``length`` slots as Hugging Face sees them: view [B, H, length, D]."""
        buffer = buffers[index]
        if self.target.kv_layout == "BLHD":
            buffer = buffer.transpose(1, 2)
        return buffer[:, :, :length]

    def filled(self, buffers: torch.Tensor, length: int) -> torch.Tensor:
        """The first ``length`` slots of all layers' buffers, a view."""
        axis = -3 if self.target.kv_layout == "BLHD" else -2
        return buffers.narrow(axis, 0, length)

    def clear(self) -> None:
        """Forget the last user's tokens: attention reads all slots, and NaN survives a mask."""
        if not self.target.appends_in_attention:
            self.self_kv.zero_()

    def reorder(self, rows: torch.Tensor, length: int) -> None:
        """Row i takes the keys and values of row ``rows[i]``."""
        for buffers, slots in ((self.self_kv, length), (self.cross_kv, self.size.sources)):
            filled = self.filled(buffers, slots)
            filled.copy_(filled.index_select(1, rows.to(self.device)))

    def unshare(self, slots: torch.Tensor, sources: int, listed: int = 0) -> "StaticKVCache":
        """Copies of the keys and values of sequences that share rows.

        Args:
            slots: [B, N, length] slots of row b that hold sequence n's tokens.
            sources: source tokens without padding.
            listed: as of ``StaticKVCache``.

        Returns:
            A cache of B * N rows that is independent of this bucket.
        """
        batch, beams, length = slots.shape
        heads, head_size = self.shape.heads, self.shape.head_size
        index = slots.view(batch, 1, -1, 1).expand(-1, heads, -1, head_size)
        cache = StaticKVCache(self.shape.layers, listed)
        pairs = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        for i in range(2 * self.shape.layers):
            name = "values" if i % 2 else "keys"
            own = self.layer(self.self_kv, i, self.size.slots).gather(2, index)
            own = own.view(batch, heads, beams, length, head_size).transpose(1, 2).flatten(0, 1)
            source = self.layer(self.cross_kv, i, sources).repeat_interleave(beams, dim=0)
            for layers, tensor in zip(pairs, (own, source), strict=True):
                setattr(layers[i // 2], name, tensor.contiguous())
                layers[i // 2].is_initialized = True
                layers[i // 2].dtype, layers[i // 2].device = tensor.dtype, tensor.device
            cache.is_updated[i // 2] = True
        return cache


class _Slots:
    """What all layers of one cache share; copies start without a lease."""

    lease: Lease | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Slots":
        return _Slots()

    def __getstate__(self) -> dict[str, Any]:
        return {}


class SlotLayer(DynamicLayer):
    """One layer's keys and values: in a leased bucket, or (``own``) in tensors of its own.

    It starts with tensors of its own and then is the stock DynamicLayer; the engine moves it into
    a bucket. Whatever the engine does not do to a cache moves it back out, and is therefore right.
    """

    def __init__(self, slots: _Slots, index: int, cross: bool) -> None:
        self._slots, self._index, self.cross = slots, index, cross
        self.own = True
        self.length = 0
        self._tensors: dict[str, torch.Tensor | None] = {}
        super().__init__()

    def _view(self, value: int) -> torch.Tensor:
        lease = self._slots.lease
        assert lease is not None
        buffers = lease.bucket.cross_kv if self.cross else lease.bucket.self_kv
        view = lease.bucket.layer(buffers, 2 * self._index + value, self.length)
        view._lease = lease  # the buffer lives as long as the view
        return view

    @property
    def keys(self) -> torch.Tensor | None:
        return self._tensors.get("keys") if self.own else self._view(0)

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._move_out()
        self._tensors["keys"] = tensor

    @property
    def values(self) -> torch.Tensor | None:
        return self._tensors.get("values") if self.own else self._view(1)

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._move_out()
        self._tensors["values"] = tensor

    def _move_out(self) -> None:
        if not self.own:
            self._tensors = {"keys": self._view(0).clone(), "values": self._view(1).clone()}
            self.own = True

    def move_in(self, length: int) -> None:
        """Say that the first ``length`` slots of the bucket are this layer's content."""
        if self.own:
            self._tensors = {}
            self.own, self.is_initialized = False, True
            keys = self._view(0)
            self.dtype, self.device = keys.dtype, keys.device
        self.length = length

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.own else self.length

    def crop(self, tokens_to_remove: int) -> None:
        if self.own:
            super().crop(tokens_to_remove)
        elif tokens_to_remove > 0 and contract.CROP_TAKES_LENGTH:
            self.length = min(self.length, tokens_to_remove)
        elif tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative one."
            )
        else:
            self.length = max(0, self.length + tokens_to_remove)

    def reset(self) -> None:
        self._move_out()
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        self_copy = copy.copy(self.__dict__)
        if not self.own:
            tensors = {"keys": self._view(0).clone(), "values": self._view(1).clone()}
            self_copy |= {"_tensors": tensors, "own": True}
        return self_copy


class StaticKVCache(EncoderDecoderCache):
    """A KV cache in engine-owned device buffers that is a Hugging Face cache too."""

    def __init__(self, layers: int, listed: int = 0) -> None:
        """
        Args:
            layers: those of the decoder.
            listed: stock's ``generate`` makes a cache of as many layers as the encoder has: where
                that is more, those behind stay empty.
        """
        self._slots = _Slots()
        caches = DynamicCache(), DynamicCache()
        for cross, cache in enumerate(caches):
            cache.layers = [SlotLayer(self._slots, i, bool(cross)) for i in range(layers)]
            cache.layers += [DynamicLayer() for _ in range(layers, listed)]
        super().__init__(*caches)

    def _own_layers(self, cross: bool) -> list[SlotLayer]:
        cache = self.cross_attention_cache if cross else self.self_attention_cache
        return [layer for layer in cache.layers if isinstance(layer, SlotLayer)]

    @property
    def bucket(self) -> Bucket | None:
        """The leased bucket, if every layer's content is in it."""
        lease = self._slots.lease
        layers = self._own_layers(False) + self._own_layers(True)
        if lease is None or any(layer.own for layer in layers):
            return None
        return lease.bucket

    def lease(self, pool: BucketPool, size: BucketSize, fresh: bool = False) -> Bucket:
        """Lease a bucket of ``size``, with this cache's content; ``fresh`` leaves what the cross
        graph computes to be filled."""
        old, lease = self._slots.lease, pool.lease(size)
        if old is not None and not fresh:
            for name in ("cross_mask", *old.bucket.shape.tables):
                lease.bucket.tensors[name].copy_(old.bucket.tensors[name])
            lease.bucket.cross_kv.copy_(old.bucket.cross_kv)  # padding too: it must be finite
        self._copy_into(lease.bucket, self._own_layers(cross=False))
        self._slots.lease = lease
        return lease.bucket

    def _copy_into(self, bucket: Bucket, layers: list[SlotLayer]) -> None:
        for i, layer in enumerate(layers):
            length = layer.get_seq_length()
            buffers = bucket.cross_kv if layer.cross else bucket.self_kv
            for value, content in enumerate((layer.keys, layer.values)):
                if length and content is not None:
                    bucket.layer(buffers, 2 * i + value, length).copy_(content)

    def move_in(self, sources: int) -> None:
        """Say that the leased bucket holds all content; a cross-attention content of one's own
        stays what later tokens attend to."""
        lease = self._slots.lease
        assert lease is not None
        self._copy_into(lease.bucket, self._own_layers(cross=True))
        self.fill(self.get_seq_length(), sources)

    def fill(self, length: int, sources: int | None = None) -> None:
        """Say that the bucket holds ``length`` tokens (and ``sources`` source tokens)."""
        for layer in self._own_layers(cross=False):
            layer.move_in(length)
        if sources is not None:
            for i, layer in enumerate(self._own_layers(cross=True)):
                layer.move_in(sources)
                self.is_updated[i] = True

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        bucket = self.bucket
        if bucket is None:
            super().reorder_cache(beam_idx)
        else:
            bucket.reorder(beam_idx, self.get_seq_length())
