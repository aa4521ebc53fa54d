"""Weights that lie in the pages of a file, as safetensors maps it.

The kernel copies such a page once somebody writes to it, and tells of it: edits are found without
a pass over the weights. And pages that nobody reads any more need no memory.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator

import numpy as np
import torch

_PAGE = mmap.PAGESIZE
_SECONDS = 0.005  # in which a session packs some 10 MB

# Bits of an entry of /proc/self/pagemap (the kernel's Documentation/admin-guide/mm/pagemap.rst)
_THERE, _OF_FILE = np.uint64(1 << 63 | 1 << 62), np.uint64(1 << 61)  # in memory or swapped

# The kernel's search for pages of a kind (the same document), since Linux 6.7: its number, what it
# is asked, and kinds of pages
_SCAN, _ASKED = 0xC0606610, struct.Struct("12Q")
_IS_FILE, _IS_THERE = 1 << 2, 1 << 3 | 1 << 4

_NEAR = 1 << 20  # bytes between two spans that are looked at, too, rather than one by one

_DELETED = " (deleted)"  # as the kernel says of a file whose name is gone: nobody writes to it

_Span = tuple[int, int]
"""The first address, and the one behind the last."""


class FilePages:
    """The pages of tensors that ``unwritten`` has found."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """``tensors`` are kept, and with them what is mapped."""
        self._tensors = [*tensors]
        self.places = {(tensor.data_ptr(), tensor.nbytes) for tensor in self._tensors}
        """Where they begin, and their bytes."""
        self._spans = _merged(map(_span, self._tensors))
        self._ranges = _merged(self._spans, _NEAR)
        mappings = _mappings() if self._tensors else []
        files = {_file_of(_span(tensor), mappings) for tensor in self._tensors}
        self._files = {path: _identity(path) for path in files if path is not None}

    def same(self) -> bool:
        """Whether they still are the file's, which nobody has written to either."""
        if any(_rewritten(*file) for file in self._files.items()):
            return False
        with _pagemap() as pagemap:
            ranges = self._ranges if _scans() else []  # one look at each, and none at the spans
            return bool(ranges and all(_unwritten(span, pagemap) for span in ranges)) or all(
                _unwritten(span, pagemap) for span in self._spans
            )

    def give_back(self) -> None:
        """Let their memory go; who reads them gets them from the file once more."""
        if not self._spans:
            return
        with _pagemap() as pagemap:
            for first, end in self._spans:
                first, end = -(-first // _PAGE) * _PAGE, end // _PAGE * _PAGE
                if first < end and _unwritten((first, end), pagemap):  # else edits would be lost
                    _madvise()(first, end - first, mmap.MADV_DONTNEED)

    @contextlib.contextmanager
    def given_back_meanwhile(self) -> Iterator[None]:
        """Give them back as the body reads them, so that they never are in memory all at once."""
        done = threading.Event()

        def give_back() -> None:
            while not done.wait(_SECONDS):
                self.give_back()

        helper = threading.Thread(target=give_back)
        if self._spans:
            with contextlib.suppress(RuntimeError):  # there are too many, or the interpreter ends
                helper.start()
        try:
            yield
        finally:
            done.set()
            if helper.ident is not None:
                helper.join()
            self.give_back()


def unwritten(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Those of contiguous CPU tensors that lie in pages of a file to which nobody has written;
    none where the kernel does not tell."""
    tensors = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.nbytes]
    if not tensors or not _told():
        return []
    mappings = _mappings()
    tensors = [tensor for tensor in tensors if _file_of(_span(tensor), mappings) is not None]
    with _pagemap() as pagemap:
        return [tensor for tensor in tensors if _unwritten(_span(tensor), pagemap)]


def _span(tensor: torch.Tensor) -> _Span:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _merged(spans: Iterable[_Span], apart: int = 0) -> list[_Span]:
    """Spans in order, those that touch as one, or that are no more than so many bytes apart."""
    merged: list[_Span] = []
    for first, end in sorted(spans):
        if merged and first <= merged[-1][1] + apart:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((first, end))
    return merged


def _mappings() -> list[tuple[int, int, str]]:
    """What is mapped privately from files, in order: first address, that behind the last, path."""
    found = []
    with contextlib.suppress(OSError), open("/proc/self/maps") as lines:
        for line in lines:
            addresses, access, _, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
            if access.endswith("p") and inode != "0" and path:
                first, end = (int(address, 16) for address in addresses.split("-"))
                found.append((first, end, path[0]))
    return found


def _file_of(span: _Span, mappings: list[tuple[int, int, str]]) -> str | None:
    """The file in which a span lies as a whole; None: in none that can be looked at."""
    index = bisect_right(mappings, span[0], key=lambda mapping: mapping[0]) - 1
    if index < 0:
        return None
    first, end, path = mappings[index]
    known = path.endswith(_DELETED) or _identity(path) is not None
    return path if first <= span[0] and span[1] <= end and known else None


def _identity(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _rewritten(path: str, before: tuple[int, ...] | None) -> bool:
    """Whether a file is other than it was. One in its place leaves what is mapped as it is."""
    now = _identity(path)
    return now is not None and before is not None and now[:2] == before[:2] and now != before


@contextlib.contextmanager
def _pagemap() -> Iterator[int]:
    """What the kernel tells of this process's pages, as an open file."""
    file = os.open("/proc/self/pagemap", os.O_RDONLY)  # a forked child's is another
    try:
        yield file
    finally:
        os.close(file)


def _unwritten(span: _Span, pagemap: int) -> bool:
    """Whether no page of a span in a file has been copied, as the first write to it does."""
    first, end = span[0] // _PAGE, -(-span[1] // _PAGE)
    if _scans():
        return not _scan(pagemap, first * _PAGE, end * _PAGE)
    pages = np.frombuffer(os.pread(pagemap, 8 * (end - first), 8 * first), np.uint64)
    copied = (pages & _THERE != 0) & (pages & _OF_FILE == 0)
    return len(pages) == end - first and not copied.any()


def _scan(pagemap: int, first: int, end: int) -> int:
    """How many of the pages between two addresses are copies, at most one. It takes a fifth, and
    less, of the time in which each of them is looked at."""
    import fcntl  # there is none on Windows, where nothing comes so far

    found = (ctypes.c_uint64 * 3)()
    of_interest = (_IS_FILE, _IS_FILE, _IS_THERE, _IS_FILE | _IS_THERE)  # which is inverted first
    asked = _ASKED.pack(
        *(_ASKED.size, 0, first, end, 0, ctypes.addressof(found), 1, 1), *of_interest
    )
    return fcntl.ioctl(pagemap, _SCAN, bytearray(asked))


@functools.cache
def _scans() -> bool:
    """Whether this kernel searches."""
    try:
        with _pagemap() as pagemap:
            _scan(pagemap, 0, _PAGE)
    except (OSError, ImportError):
        return False
    return True


@functools.cache
def _told() -> bool:
    """Whether this system's kernel tells: of a page of this file, before and after a write."""
    try:
        _madvise()
        with (
            open(__file__, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped,
            _pagemap() as pagemap,
        ):
            bits = np.frombuffer(mapped, np.uint8)
            span = bits.ctypes.data, bits.ctypes.data + len(bits)
            bits.max()  # or the page would not be there
            before = _file_of(span, _mappings()) is not None and _unwritten(span, pagemap)
            bits[0] = 0
            after = _unwritten(span, pagemap)
            del bits  # or nobody could close what is mapped
        return before and not after
    except (OSError, AttributeError, TypeError):  # on other systems than Linux
        return False


@functools.cache
def _madvise() -> "ctypes._NamedFuncPointer":
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
