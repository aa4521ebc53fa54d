"""Memory that a file backs, such as a checkpoint's: it can leave a process without being lost."""

import ctypes
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")
_OWN = "Anonymous:", "Swap:"  # what a process has written there, and no file has


def give_back(ranges: Iterable[tuple[int, int]]) -> None:
    """Give back the whole pages in these ranges (first address, bytes) that a file holds as they
    are; whoever reads them again has them from the file. Others stay, and so do all where the
    system does not tell (other systems than Linux)."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    try:
        files = list(_unwritten(Path("/proc/self/smaps").read_text()))
    except OSError:
        return
    for first, size in ranges:
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (first + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end and any(begin <= start and end <= stop for begin, stop in files):
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(advice)
            )


def _unwritten(text: str) -> Iterator[tuple[int, int]]:
    """First and last address of what files back and this process has not written to."""
    found = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            if found is not None:
                yield found
            found = (int(header[1], 16), int(header[2], 16)) if header[3] != "0" else None
        elif line.startswith(_OWN) and line.split()[1] != "0":
            found = None
    if found is not None:
        yield found
