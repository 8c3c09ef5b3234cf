"""Reads the JSON files of a model, with limits on their size and number of items."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from meshd.errors import ModelFileError

MAX_JSON_BYTES = 16 << 20
MAX_ITEMS = 1 << 20
"""Limit for the number of commas and opening brackets in a document, which bounds the memory that the parsed document takes."""


def read_json(path: Path, *, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a file that contains a JSON object. Raises: ModelFileError."""
    return parse_object(read_bytes(path, most_bytes=most_bytes), str(path))


def read_bytes(path: Path, *, most_bytes: int) -> bytes:
    """Read a file of at most `most_bytes`. Raises: ModelFileError."""
    try:
        with path.open("rb") as file:
            # read(n) allocates n bytes even if the file is smaller, so n is at most the file's size + 1.
            data = file.read(min(most_bytes, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        hint = "make it readable, or fetch its folder again"
        raise ModelFileError(f"{path} can't be read: {error.strerror or error}", hint=hint) from error
    if len(data) > most_bytes:
        raise ModelFileError(f"{path} can't be used: it is larger than {most_bytes:,} bytes", hint="take another repository")
    return data


def parse_object(data: bytes, name: str, *, most_items: int = MAX_ITEMS) -> dict[str, Any]:
    """Parse a JSON object. A duplicate key is an error, since readers differ in which value they take. Raises: ModelFileError."""

    def fail(why: str) -> NoReturn:
        raise ModelFileError(f"{name} can't be used: {why}", hint="the file is damaged or of another format: fetch it again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    fail(f"{shown(key)} appears twice")
                seen.add(key)
        return found

    if sum(map(data.count, (b",", b"[", b"{"))) > most_items:
        fail(f"its JSON has more than {most_items:,} items")
    try:
        found = json.loads(data.decode(), object_pairs_hook=unique)
        if b"\\u" in data:
            json.dumps(found, ensure_ascii=False).encode()  # fails for a lone surrogate, which is not valid text
    except RecursionError:
        fail("its JSON is nested too deep")
    except ValueError as error:
        fail(f"its JSON can't be read: {error}")
    if not isinstance(found, dict):
        fail("its JSON is not an object")
    return found


def shown(value: Any) -> str:
    """Format a value for a message: its first 100 characters, quoted, with escapes for those outside ASCII."""
    return ascii(str(value)[:100])


def whole_number(value: Any, most: int) -> int | None:
    """Return a JSON value if it is an integer from 0 to `most`, otherwise None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most else None


def string_map(value: Any) -> Mapping[str, str] | None:
    """Return a JSON value if it is an object whose values are strings, otherwise None."""
    return value if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()) else None
