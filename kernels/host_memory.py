"""What the C library does with large blocks of memory that were freed."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of <malloc.h>
_NEVER = -1  # the largest int would be a threshold of 2 GiB


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed blocks of any size for the whole process; False where there is no glibc.

    By default it maps blocks above 32 MB anew at each request and unmaps them when they are freed, so that every
    page of a large feature map is faulted in and zeroed at each use. The price: the process's memory stays at its
    peak until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
