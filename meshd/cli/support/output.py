"""Format and print output: plain aligned columns, sizes, times.

Names and messages may come from another peer or from a model's file: nothing in them must command the terminal.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from meshd.bounds import UNPRINTABLE, printable

_UNPRINTABLE = re.compile(f"(?!\\n)[{UNPRINTABLE}]")


def print_json(document: Any) -> None:
    """Print one indented JSON document. Unprintable characters are written as JSON escapes."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    print(_UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def show(text: str, *, file: TextIO | None = None, end: str = "\n") -> None:
    """Print text at once, its unprintable characters as spaces or escapes."""
    print(printable(text, keep="\n"), file=file, end=end, flush=True)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format left-aligned columns, two spaces apart and without lines, so that grep and awk can read them."""
    lines = [list(headers), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
