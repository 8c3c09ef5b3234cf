"""Counts the objects that a peer's process keeps, by where they are kept."""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import msgspec

from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.memory import LayerMemory

_CONTAINERS = (dict, list, set, frozenset, deque, OrderedDict, Counter, tuple)
_BYTES = (bytearray, bytes)
_LEAVES = (str, int, float, bool, type(None), memoryview)
_LEFT_OUT = (HostArena, LayerMemory)


def kept(root: object) -> Counter[str]:
    """Count the members of all containers that are reachable from meshd's objects, by the class and the attribute.

    The arena of KV is left out: `Checks` counts its leases. So is what each loaded layer remembers of a token: it changes
    with the layers that a peer holds. An entry of 1 KiB of a `bytearray` counts as one object. Parts that do not change
    with time (specifications, cards, plans) are counted too.
    """
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    waiting: list[tuple[object, str]] = [(root, type(root).__name__)]
    while waiting:
        value, path = waiting.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _BYTES):
            counts[path] += len(value) // 1024
        elif isinstance(value, _CONTAINERS):
            counts[path] += len(value)
            waiting += [(member, path) for member in _members(value)]
        elif type(value).__module__.startswith("meshd.") and not isinstance(value, _LEFT_OUT):
            waiting += [(member, f"{type(value).__name__}.{name}") for name, member in _attributes(value)]
    return counts


def _members(value: Any) -> list[object]:
    return [*value.values(), *value.keys()] if isinstance(value, dict) else list(value)


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, msgspec.Struct):
        return  # values of messages and records do not grow by themselves
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)
