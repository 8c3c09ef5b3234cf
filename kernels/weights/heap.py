"""Returns freed memory of the process's heap to the system."""

import contextlib
import ctypes
import sys


def return_freed_memory() -> None:
    """Return free pages to the system. Loading frees about as much memory as it keeps, and glibc would keep what was freed."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # only glibc has malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
