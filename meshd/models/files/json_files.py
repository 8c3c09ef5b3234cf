"""JSON beside a model's weights: read whole, but never more of it than is sensible."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from meshd.errors import ModelFileError

MAX_JSON_BYTES = 16 << 20
MAX_ITEMS = 1 << 20
"""Commas and brackets of a document: what it can come to in memory is bound by them, whatever its size."""


def read_json(path: Path, *, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A file's JSON object. Raises: ModelFileError."""
    return parse_object(read_bytes(path, most_bytes=most_bytes), str(path))


def read_bytes(path: Path, *, most_bytes: int) -> bytes:
    """All of a small file. Raises: ModelFileError."""
    try:
        with path.open("rb") as file:
            # Not `most_bytes` at once: a reader takes memory for all that it is asked for.
            data = file.read(min(most_bytes, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read: {error.strerror or error}") from error
    if len(data) > most_bytes:
        raise ModelFileError(f"{path} can't be used: it is larger than {most_bytes:,} bytes")
    return data


def parse_object(data: bytes, name: str, *, most_items: int = MAX_ITEMS) -> dict[str, Any]:
    """A JSON object. A key that is there twice is refused: readers would differ in which of them counts. Raises: ModelFileError."""

    def fail(why: str) -> NoReturn:
        raise ModelFileError(f"{name} can't be used: {why}", hint="the file is damaged or no such file: fetch it again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    fail(f"{shown(key)} is there twice")
                seen.add(key)
        return found

    if sum(map(data.count, (b",", b"[", b"{"))) > most_items:
        fail(f"its JSON has more than {most_items:,} items")
    try:
        found = json.loads(data.decode(), object_pairs_hook=unique)
        if b"\\u" in data:
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text: nobody could write it down
    except RecursionError:
        fail("its JSON is nested too deep")
    except ValueError as error:
        fail(f"its JSON can't be read: {error}")
    if not isinstance(found, dict):
        fail("its JSON is no object")
    return found


def shown(value: Any) -> str:
    """A value as a message shows it: short, and in characters that can be written."""
    return ascii(str(value)[:100])


def whole_number(value: Any, most: int) -> int | None:
    """A JSON number that is an integer from 0 to `most`; None: it is something else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most else None


def texts(value: Any) -> Mapping[str, str] | None:
    """A JSON object of strings; None: it is something else."""
    return value if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()) else None
