"""What the C library does with large blocks of memory: freed ones are kept, and lie on huge pages."""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of <malloc.h>
_HUGE_PAGES = 14  # MADV_HUGEPAGE of <sys/mman.h>
HUGE_PAGE = 2 << 20  # bytes, on x86-64 and mostly on arm64
RESERVED = 4 << 30  # bytes of addresses, no memory before it is used
OVERCOMMIT, HUGE = "/proc/sys/vm/overcommit_memory", "/sys/kernel/mm/transparent_hugepage/enabled"


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed blocks of any size for the whole process; False where there is no glibc.

    By default it maps blocks above 32 MB anew at each request and unmaps them when they are freed, so that every
    page of a large feature map is faulted in and zeroed at each use. The price: the process's memory stays at its
    peak until it ends. Where the system gives huge pages to who asks, the first `RESERVED` bytes are made of them.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
    if kept and huge_pages_on_demand():
        _ask_for_huge_pages()
    return kept


def huge_pages_on_demand() -> bool:
    """Whether asking for them changes anything, and address space is not counted as memory."""
    try:
        return "[madvise]" in Path(HUGE).read_text() and Path(OVERCOMMIT).read_text().strip() != "2"
    except OSError:
        return False


@cache
def _ask_for_huge_pages() -> bool:
    """Once a process: have malloc's heap begin with `RESERVED` free bytes that the system is to back by huge pages.

    Translating addresses of 4 KiB pages costs convolutions and passes over large maps some percent. malloc has no
    option for it after the process has started, but what it gave and got back stays in its heap.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [c_size_t], c_void_p
    libc.free.argtypes, libc.free.restype = [c_void_p], None
    libc.madvise.argtypes = [c_void_p, c_size_t, c_int]
    block = libc.malloc(RESERVED)
    if not block:  # a limit on address space
        return False
    first, end = -(-block // HUGE_PAGE) * HUGE_PAGE, (block + RESERVED) // HUGE_PAGE * HUGE_PAGE
    done = libc.madvise(first, end - first, _HUGE_PAGES) == 0
    libc.free(block)
    return done
