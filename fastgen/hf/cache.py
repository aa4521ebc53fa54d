"""The KV cache: engine-owned buckets, as a cache that Hugging Face code understands."""

import copy
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from fastgen.execution.bucket import Bucket, BucketPool, BucketSize, Lease
from fastgen.hf import contract


class _Slots:
    """What all layers of one cache share; copies start without a lease."""

    lease: Lease | None = None

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        """Of what the layers give, whatever their bucket holds; None: as that is."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Slots":
        return _Slots(self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"dtype": self.dtype}


_OF_STOCK = {
    name: value for name, value in vars(DynamicLayer()).items() if name not in ("keys", "values")
}
"""Attributes that stock's constructor gives a layer: to ask it, a call would wait for each."""


class SlotLayer(DynamicLayer):
    """One layer's keys and values: in a leased bucket, or (``own``) in tensors of its own.

    It starts with tensors of its own and then is the stock DynamicLayer; the engine moves it into
    a bucket. Whatever the engine does not do to a cache moves it back out, and is therefore right.
    """

    def __init__(self, slots: _Slots, index: int, cross: bool) -> None:
        self.__dict__.update(_OF_STOCK)
        self._slots, self._index, self.cross = slots, index, cross
        self.own = True
        self.length = 0
        self._tensors: dict[str, torch.Tensor | None] = {}

    def _view(self, value: int) -> torch.Tensor:
        lease = self._slots.lease
        assert lease is not None
        buffers = lease.bucket.cross_kv if self.cross else lease.bucket.self_kv
        view = lease.bucket.layer(buffers, 2 * self._index + value, self.length)
        view._lease = lease  # type: ignore[attr-defined]  # the buffer lives as long as the view
        return view

    def _given(self, name: str) -> torch.Tensor | None:
        """Keys or values as whoever is no engine gets them. He may edit them: what is cast for him
        is this layer's content from now on."""
        dtype = self._slots.dtype
        if not self.own:
            view = self._view(("keys", "values").index(name))
            if dtype in (None, view.dtype):
                return view
            self._move_out()
        tensor = self._tensors.get(name)
        if tensor is not None and dtype is not None:
            tensor = self._tensors[name] = tensor.to(dtype)
        return tensor

    @property
    def keys(self) -> torch.Tensor | None:
        return self._given("keys")

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._move_out()
        self._tensors["keys"] = tensor

    @property
    def values(self) -> torch.Tensor | None:
        return self._given("values")

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._move_out()
        self._tensors["values"] = tensor

    def _move_out(self) -> None:
        if not self.own:
            self._tensors = {"keys": self._view(0).clone(), "values": self._view(1).clone()}
            self.own = True

    def move_in(self, bucket: Bucket, length: int) -> None:
        """Say that the first ``length`` slots of the leased bucket are this layer's content."""
        if self.own:
            self._tensors = {}
            self.own, self.is_initialized = False, True
            self.dtype, self.device = self._slots.dtype or bucket.dtype, bucket.device
        self.length = length

    def content(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values as they are held."""
        if self.own:
            return self._tensors.get("keys"), self._tensors.get("values")
        return self._view(0), self._view(1)

    def get_seq_length(self) -> int:
        if not self.own:
            return self.length
        keys = self._tensors.get("keys")
        return 0 if keys is None or not keys.numel() else keys.shape[-2]

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


class _EmptyLayer(DynamicLayer):
    """A layer that nothing fills; before transformers 5.18 a stock one could not be cropped."""

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_initialized:
            super().crop(tokens_to_remove)


class LeasedCache:
    """Mixin of a Hugging Face cache whose layers are SlotLayers of one bucket."""

    _slots: _Slots
    get_seq_length: Any

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the keys and values that it gives."""
        return self._slots.dtype

    source_mask: torch.Tensor | None
    """What the bucket's cross-attention mask is made of; not there before there is a bucket."""

    def _own_layers(self, cross: bool) -> list[SlotLayer]:
        raise NotImplementedError

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
            lease.bucket.take_over(old.bucket)
        self._copy_into(lease.bucket, self._own_layers(cross=False))
        self._slots.lease = lease
        return lease.bucket

    def _copy_into(self, bucket: Bucket, layers: list[SlotLayer]) -> None:
        for i, layer in enumerate(layers):
            if not layer.is_initialized or not (length := layer.get_seq_length()):
                continue
            buffers = bucket.cross_kv if layer.cross else bucket.self_kv
            for value, content in enumerate(layer.content()):
                if content is not None:
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
        lease = self._slots.lease
        assert lease is not None
        for layer in self._own_layers(cross=False):
            layer.move_in(lease.bucket, length)
        if sources is not None:
            for i, layer in enumerate(self._own_layers(cross=True)):
                layer.move_in(lease.bucket, sources)
                self._note_source(i)

    def _note_source(self, layer: int) -> None:
        """A layer's cross-attention content is there."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        bucket = self.bucket
        if bucket is None:
            super().reorder_cache(beam_idx)  # type: ignore[misc]
        else:
            bucket.reorder(beam_idx, self.get_seq_length())


class StaticKVCache(LeasedCache, EncoderDecoderCache):
    """A KV cache in engine-owned device buffers that is a Hugging Face cache too."""

    def __init__(self, layers: int, listed: int = 0, dtype: torch.dtype | None = None) -> None:
        """
        Args:
            layers: those of the decoder.
            listed: stock's ``generate`` makes a cache of as many layers as the encoder has: where
                that is more, those behind stay empty.
            dtype: of the keys and values that it gives; None: as the engine holds them.
        """
        self._slots = _Slots(dtype)
        caches = DynamicCache(), DynamicCache()
        for cross, cache in enumerate(caches):
            cache.layers = [SlotLayer(self._slots, i, bool(cross)) for i in range(layers)]
            cache.layers += [_EmptyLayer() for _ in range(layers, listed)]
        super().__init__(*caches)

    def _own_layers(self, cross: bool) -> list[SlotLayer]:
        cache = self.cross_attention_cache if cross else self.self_attention_cache
        return [layer for layer in cache.layers if isinstance(layer, SlotLayer)]

    def _note_source(self, layer: int) -> None:
        self.is_updated[layer] = True


class StaticDecoderCache(LeasedCache, DynamicCache):
    """The same of a model without an encoder."""

    def __init__(self, layers: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._slots = _Slots(dtype)
        self.layers = [SlotLayer(self._slots, i, False) for i in range(layers)]

    def _own_layers(self, cross: bool) -> list[SlotLayer]:
        return [] if cross else [layer for layer in self.layers if isinstance(layer, SlotLayer)]


def unshared(
    bucket: Bucket,
    slots: torch.Tensor,
    dtype: torch.dtype | None,
    sources: int,
    listed: int = 0,
) -> StaticKVCache | StaticDecoderCache:
    """Copies of the keys and values of sequences that share rows.

    Args:
        slots: [B, N, length] slots of row b that hold sequence n's tokens.
        dtype: as of ``StaticKVCache``.
        sources: source tokens without padding.
        listed: as of ``StaticKVCache``.

    Returns:
        A cache of B * N rows that is independent of the bucket.
    """
    batch, beams, length = slots.shape
    heads, head_size = bucket.shape.stored_heads, bucket.shape.head_size
    index = slots.view(batch, 1, -1, 1).expand(-1, heads, -1, head_size)
    cache: StaticKVCache | StaticDecoderCache = StaticDecoderCache(bucket.shape.layers, dtype)
    if bucket.shape.source:
        cache = StaticKVCache(bucket.shape.layers, listed, dtype)
    own, source = cache._own_layers(cross=False), cache._own_layers(cross=True)
    for i in range(2 * bucket.shape.layers):
        rows = bucket.layer(bucket.self_kv, i, bucket.size.slots).gather(2, index)
        rows = rows.view(batch, heads, beams, length, head_size).transpose(1, 2).flatten(0, 1)
        _keep(own[i // 2], i % 2, rows)
        if source:
            rows = bucket.layer(bucket.cross_kv, i, sources).repeat_interleave(beams, dim=0)
            _keep(source[i // 2], i % 2, rows)
            cache._note_source(i // 2)
    return cache


def _keep(layer: SlotLayer, value: int, tensor: torch.Tensor) -> None:
    """Give a layer keys (or, by 1, values) of its own."""
    setattr(layer, "values" if value else "keys", tensor.contiguous())
    layer.is_initialized = True
    layer.dtype, layer.device = tensor.dtype, tensor.device
