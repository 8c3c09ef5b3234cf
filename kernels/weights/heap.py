"""The process's heap."""

import contextlib
import ctypes
import sys


def return_freed_memory() -> None:
    """Hand free pages back to the system: loading frees about as much as it keeps, and glibc would hold on to it."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
