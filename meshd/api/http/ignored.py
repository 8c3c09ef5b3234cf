"""Name the fields of a request that have no effect, for the header `x-meshd-ignored`.

Clients send hints that other servers know. To refuse them would exclude these clients, and to drop them without a word would hide
a misspelt option; so the answer names them. The names come from the client, so their number, length and characters are bounded.
"""

import functools
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from aiohttp import web
from msgspec import inspect

HEADER = "x-meshd-ignored"
MAX_NAMES = 32
"""Most names in the header. It then ends with how many there are besides."""
MAX_NAME_CHARACTERS = 96
"""Longest name in the header, after encoding. A longer one is cut."""
_PLAIN = "._-[]$@/:+*!~()"
"""Characters of names that the header shows as they are, besides letters and digits. Others are percent-encoded."""


@dataclass(slots=True)
class IgnoredFields:
    """The ignored fields of one request: the first `MAX_NAMES` names, and how many there are in all."""

    names: list[str]
    count: int = 0

    def add(self, name: str) -> None:
        """Add the path of a field, such as `messages[0].id`."""
        self.count += 1
        if len(self.names) < MAX_NAMES:
            self.names.append(name)

    def header(self) -> str:
        """Return the header's value: encoded names, separated by a comma; empty if there is none."""
        shown = [quote(name, safe=_PLAIN, errors="replace")[:MAX_NAME_CHARACTERS] for name in self.names]
        more = self.count - len(shown)
        return ", ".join([*shown, f"and {more} more"] if more > 0 else shown)


IGNORED = web.RequestKey("ignored", IgnoredFields)
"""Key under which a request stores its ignored fields."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a type has structs that ignore unknown fields."""

    fields: dict[str, "_Layout | None"] | None = None
    """Fields of the struct, if a JSON object of this type is one. None as a value: no such structs inside."""
    items: "_Layout | None" = None
    """Layout of the items, if a JSON array of this type has structs inside."""


@functools.cache
def strict_form(shape: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """Return a subclass of `shape` that refuses unknown fields, in itself and in the structs inside it.

    If a body is valid for it, there is nothing to name, and the body need not be read once more to look for names.
    """
    hints = typing.get_type_hints(shape, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for known in msgspec.structs.fields(shape):
        hint = _strict_hint(hints[known.name])
        if hint is hints[known.name]:
            continue
        given = {"default": known.default, "default_factory": known.default_factory}
        fields.append((known.name, hint, msgspec.field(**given)))
    return msgspec.defstruct(
        shape.__name__, fields, bases=(shape,), module=shape.__module__, forbid_unknown_fields=True, frozen=True, kw_only=True
    )


def _strict_hint(hint: Any) -> Any:
    """Replace the structs in a type by their strict forms. Returns: the same object if there are none."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint if hint.__struct_config__.forbid_unknown_fields else strict_form(hint)
    if typing.get_origin(hint) is Annotated:
        inside = _strict_hint(hint.__origin__)
        return hint if inside is hint.__origin__ else Annotated[(inside, *hint.__metadata__)]
    parts = typing.get_args(hint)
    strict = tuple(map(_strict_hint, parts))
    if all(new is old for new, old in zip(strict, parts, strict=True)):
        return hint
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.Union[strict]  # noqa: UP007 - a tuple of types can't be joined with |
    return typing.get_origin(hint)[strict]


def unknown_fields(data: bytes, shape: type[msgspec.Struct]) -> IgnoredFields:
    """Find the fields of a JSON body that its type, and the types inside it, do not have.

    `data` must be valid for `shape`. Values of unknown fields are skipped without being decoded.
    """
    found = IgnoredFields([])
    layout = _layout_of(shape)
    if layout is not None:
        _walk(data.lstrip(b" \t\r\n"), layout, "", found)
    return found


def _walk(data: bytes | msgspec.Raw, layout: _Layout, path: str, found: IgnoredFields) -> None:
    first = _first(data)
    if first == b"[" and layout.items is not None:
        for index, item in enumerate(_items.decode(data)):
            _walk(item, layout.items, f"{path}[{index}]", found)
    elif layout.fields is not None and first not in (b"[", b'"', b"n"):
        for name, value in _members.decode(data).items():
            where = f"{path}.{name}" if path else name
            if name not in layout.fields:
                if _first(value) != b"n":  # null says the same as no field at all
                    found.add(where)
            elif (inside := layout.fields[name]) is not None:
                _walk(value, inside, where, found)


def _first(data: bytes | msgspec.Raw) -> bytes:
    return bytes(memoryview(data)[:1])


_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_items = msgspec.json.Decoder(list[msgspec.Raw])


@functools.cache
def _layout_of(shape: type[msgspec.Struct]) -> _Layout | None:
    return _layout(inspect.type_info(shape))


def _layout(kind: inspect.Type) -> _Layout | None:
    """Return the layout of a type; None if it has no structs that ignore unknown fields."""
    match kind:
        case inspect.Metadata(type=inner):
            return _layout(inner)
        case inspect.StructType(fields=fields, forbid_unknown_fields=False):
            return _Layout(fields={field.encode_name: _layout(field.type) for field in fields})
        case inspect.ListType(item_type=item):
            inside = _layout(item)
            return None if inside is None else _Layout(items=inside)
        case inspect.UnionType(types=kinds):
            inner_layouts = [found for one in kinds if (found := _layout(one)) is not None]
            fields_of = next((one.fields for one in inner_layouts if one.fields is not None), None)
            items_of = next((one.items for one in inner_layouts if one.items is not None), None)
            return None if not inner_layouts else _Layout(fields=fields_of, items=items_of)
    return None
