"""Makes messages from their types: well-formed ones with values at their bounds, and ones that are out of bounds.

The types come from `REGISTRY`, so that a new message is used without being named here.
"""

import copy
import math
import random
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import inspect

from meshd.protocol.messages import REGISTRY, Message

OUT_OF_BOUNDS: tuple[Any, ...] = (
    -1, -(10**8), -(2**63), 2**31, 2**53 + 1, 2**62, 2**63, 2**64 - 1, 0.5, math.nan, math.inf, -math.inf, 1e300, True, None,
    "", "\x1b[2J\x1b]0;x\x07", "a\nb", "\u202eb", "x" * 5000, "-5", [], [2**62, 0], {}, {"x": 1},
)  # fmt: skip
_TEXTS = (
    "", "f32", "f16", "i32", "active", "loading", "draining", "failed", "stop", "length", "error", "torch", "cancelled", "llama",
    "Q4_1", "x" * 63, "x" * 300, "x" * 4000, "b", "file:/etc/passwd", "file:", "hf:", "127.0.0.1:1", "[::1]:0",
    "a:0-12,b:12-30", "../..", "%s%n{0}", "peer_lost", "out_of_memory", "0" * 64, "ab" * 32, "0" * 32, "a" * 52, "é" * 60,
)  # fmt: skip
_TRIES = 8


class MessageMaker:
    """Makes random messages. `known` are values of named types that mean something to the receiver: ids, ranges of layers."""

    def __init__(self, dice: random.Random, known: dict[str, list[Any]]) -> None:
        self._dice = dice
        self.known = known
        self._numbers = sorted(REGISTRY)
        self._types = {number: inspect.type_info(message) for number, message in REGISTRY.items()}
        self._fitting: dict[tuple[str | None, int | None], Sequence[str]] = {}

    def body(self, number: int | None = None) -> tuple[int, dict[str, Any]]:
        """Make a message within its bounds, as plain values. Returns: its number and its fields."""
        while True:
            chosen = number if number is not None else self._dice.choice(self._numbers)
            for _ in range(_TRIES):
                body = self._value(self._types[chosen])
                try:
                    msgspec.convert(body, REGISTRY[chosen])
                except msgspec.ValidationError:
                    continue  # two of its fields contradict one another
                return chosen, body

    def message(self, number: int | None = None) -> Message:
        """Make a message within its bounds."""
        chosen, body = self.body(number)
        return msgspec.convert(body, REGISTRY[chosen])

    def spoilt(self) -> tuple[int, dict[str, Any]]:
        """Make a message of which some values are out of bounds, or of another type."""
        number, body = self.body()
        for _ in range(self._dice.choice((1, 1, 2, 5))):
            self._spoil(body)
        return number, body

    def _spoil(self, value: Any) -> None:
        """Replace one value at a random depth."""
        while True:
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            if not keys:
                return
            key = self._dice.choice(keys)
            if isinstance(value[key], dict | list) and value[key] and self._dice.random() < 0.8:
                value = value[key]
                continue
            value[key] = copy.deepcopy(self._dice.choice(OUT_OF_BOUNDS))
            return

    def _value(self, node: inspect.Type) -> Any:
        dice = self._dice
        match node:
            case inspect.Metadata(inner, extra_json_schema=schema):
                known = self.known.get((schema or {}).get("title", ""))
                return dice.choice(known) if known and dice.random() < 0.75 else self._value(inner)
            case inspect.StructType(cls):
                return self._struct(node, cls.__name__)
            case inspect.IntType(ge=least, le=most):
                return self._number(least, most)
            case inspect.FloatType(ge=least, le=most):
                return dice.choice((least, most, 1e-9 if least == 0 else -1e-9, dice.uniform(least, min(most, least + 10))))
            case inspect.BoolType():
                return dice.random() < 0.5
            case inspect.NoneType():
                return None
            case inspect.StrType(max_length=most, pattern=pattern):
                return dice.choice(self._texts(pattern, most))
            case inspect.UnionType(types):
                return self._value(dice.choice(types))
            case inspect.EnumType(cls):
                return dice.choice([value.value for value in cls])
            case inspect.VarTupleType(item, min_length=least, max_length=most):
                return [self._value(item) for _ in range(max(least or 0, self._length(most)))]
            case inspect.TupleType(items):
                return [self._value(item) for item in items]
            case inspect.DictType(key, item, max_length=most):
                return {self._value(key): self._value(item) for _ in range(self._length(most))}
        raise TypeError(f"a field of type {node} can't be made yet")

    def _struct(self, node: inspect.StructType, name: str) -> Any:
        if (known := self.known.get(name)) and self._dice.random() < 0.9:
            return msgspec.to_builtins(self._dice.choice(known))
        fields = [field for field in node.fields if node.array_like or field.required or self._dice.random() < 0.7]
        values = {field.encode_name: self._value(field.type) for field in fields}
        return list(values.values()) if node.array_like else values

    def _number(self, least: int | None, most: int | None) -> int:
        low, high = least if least is not None else -(2**63), most if most is not None else 2**63 - 1
        near = (low, low + 1, high, high - 1, min(high, max(low, self._dice.choice((0, 1, 2, 3, 12, 30, 31, 128, 1024)))))
        return self._dice.choice((*near, self._dice.randint(low, high)))

    def _length(self, most: int | None) -> int:
        return min(most or 0, self._dice.choice((0, 0, 1, 1, 2, 3, 17)))

    def _texts(self, pattern: str | None, most: int | None) -> Sequence[str]:
        key = pattern, most
        if key not in self._fitting:
            found = [text for text in _TEXTS if (most is None or len(text) <= most) and (not pattern or re.search(pattern, text))]
            self._fitting[key] = found or [_example(pattern or "")]
        return self._fitting[key]


def _example(pattern: str) -> str:
    """Make a text for a pattern of one class of characters with one length, such as an id's."""
    found = re.fullmatch(r"\\A\[(\w).*\]\{(\d+)\}\\Z", pattern)
    if found is None:
        raise ValueError(f"no text is known that matches {pattern}: add one to _TEXTS")
    return found[1] * int(found[2])
