"""SPEC.md matches the code: every message, every struct, every constant."""

import json
import re
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Meta

import meshd.bounds
import meshd.types
from meshd.agents.links import link_table, task_budget
from meshd.agents.links.restoring import history
from meshd.agents.membership.adverts.encoding import MAX_PROFILE_BYTES
from meshd.protocol import framing, handshake, messages
from meshd.protocol.framing import MIB
from meshd.protocol.messages import REGISTRY, Message, Reply, Request

SPEC = (Path(messages.__file__).parents[1] / "SPEC.md").read_text()
ROWS = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in SPEC.splitlines() if line.startswith("|")]
IDENTITY = json.loads((Path(__file__).parent / "golden" / "identity.json").read_text())


def type_text(annotation: Any, most: str = "") -> str:
    """Write a field's type in the notation of SPEC.md. `most`: the bound of a list or map."""
    if isinstance(annotation, typing.NewType):
        return annotation.__name__
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        meta = inner[1]
        least = f"{meta.min_length} to " if meta.min_length else ""
        return meta.title or type_text(inner[0], f"; {least}{meta.max_length}")
    if origin is tuple and inner[-1] is Ellipsis:
        assert most, f"{annotation} has no bound"
        return f"[{type_text(inner[0])}{most}]"
    if origin is tuple:
        return f"[{', '.join(map(type_text, inner))}]"
    if origin is dict:
        assert most, f"{annotation} has no bound"
        return f"{{{type_text(inner[0])}: {type_text(inner[1])}{most}}}"
    if origin in (types.UnionType, typing.Union):
        (known,) = [part for part in inner if part is not type(None)]
        return f"{type_text(known)}?"
    assert annotation is bool or issubclass(annotation, msgspec.Struct | Enum), f"{annotation} has no bound"
    return str(annotation.__name__)


def fields_text(struct: type[msgspec.Struct]) -> str:
    """Write all fields in order, with the defaults of those that may be missing."""
    hints = typing.get_type_hints(struct, include_extras=True)
    shown = []
    for field in msgspec.structs.fields(struct):
        text = f"{field.name}: {type_text(hints[field.name])}"
        if field.default_factory is not msgspec.NODEFAULT:
            text += f" = {json.dumps(field.default_factory())}"
        elif field.default is not msgspec.NODEFAULT:
            text += f" = {json.dumps(msgspec.to_builtins(field.default))}"
        shown.append(text)
    return "`" + ", ".join(shown) + "`"


def name_text(message: type[Message]) -> str:
    """Convert a class name to the name in SPEC.md, such as `HeartbeatAck` to HEARTBEAT_ACK."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", message.__name__).upper()


def kind_text(message: type[Message]) -> str:
    return "request" if issubclass(message, Request) else "reply" if issubclass(message, Reply) else "message"


def nested_structs() -> dict[str, type[msgspec.Struct]]:
    """Collect the structs that messages contain, by name."""
    found: dict[str, type[msgspec.Struct]] = {}

    def look(annotation: Any) -> None:
        for part in typing.get_args(annotation):
            look(part)
        if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct) and annotation.__name__ not in found:
            found[annotation.__name__] = annotation
            for hint in typing.get_type_hints(annotation).values():
                look(hint)

    for message in REGISTRY.values():
        for field in msgspec.structs.fields(message):
            look(typing.get_type_hints(message)[field.name])
    look(meshd.types.Profile)  # a payload
    return found


def test_the_table_of_messages_is_the_code() -> None:
    described = {row[0]: row[1:5] for row in ROWS if row[0].isdecimal()}
    assert described == {
        str(number): (name_text(message), kind_text(message), message.default_lane.name.lower(), fields_text(message))
        for number, message in REGISTRY.items()
    }


def test_the_table_of_structs_is_the_code() -> None:
    structs = nested_structs()
    described = {row[0]: row[1:3] for row in ROWS if row[0] in structs}
    assert described == {
        name: ("array" if struct.__struct_config__.array_like else "map", fields_text(struct)) for name, struct in structs.items()
    }


def bounded_types() -> dict[str, tuple[str, Meta]]:
    """Collect the named types of numbers, texts and ids: the Python type and the bounds of each, by name."""
    named = {name: value for module in (meshd.bounds, meshd.types) for name, value in vars(module).items()}
    annotated = {name: getattr(value, "__supertype__", value) for name, value in named.items()}
    parts = {name: typing.get_args(value) for name, value in annotated.items() if typing.get_origin(value) is typing.Annotated}
    return {name: (inner[0].__name__, inner[1]) for name, inner in parts.items()}


def test_the_table_of_bounds_is_the_code() -> None:
    types_ = bounded_types()
    assert {meta.title for _, meta in types_.values()} == set(types_)
    described = {row[0]: row[1:3] for row in ROWS if row[0] in types_}
    assert described == {name: (kind, meshd.bounds.describe(meta)) for name, (kind, meta) in types_.items()}


def test_every_message_is_explained() -> None:
    for message in REGISTRY.values():
        name = name_text(message)
        assert len(re.findall(rf"\b{name}\b", SPEC)) >= 2, f"SPEC.md has {name} only in the table of fields"


@pytest.mark.parametrize("value", IDENTITY.values(), ids=IDENTITY.keys())
def test_the_test_vector_is_in_the_text(value: str) -> None:
    assert value in re.sub(r"\n", "", SPEC)


def test_the_example_of_a_frame_is_the_golden_one() -> None:
    frame = (Path(__file__).parent / "golden" / "72_steps.bin").read_bytes().hex()
    assert frame in re.sub(r"\n", "", SPEC)
    assert f"`{frame[:8]}` is the header's length and `{frame[8:16]}` the payload's" in SPEC


def test_the_constants_are_the_code() -> None:
    timing = link_table.Timing()
    major, minor = messages.PROTOCOL_VERSION
    for expected in (
        f"Version `[{major}, {minor}]`",
        f"{framing.MAX_HEADER} bytes",
        f"{framing.MAX_HEADER_HARD} bytes",
        f"{framing.MAX_PAYLOAD} bytes",
        f"at least {handshake._MIN_HEADER}",
        f"every {timing.heartbeat_s:g} s",
        f"for {timing.silence_s:g} s",
        f"within {timing.handshake_s:g} s",
        f"after {timing.restore_s:g} s",
        f"when {history.REPORT_MESSAGES} messages or\n  {history.REPORT_BYTES // MIB} MiB of payloads have arrived",
        f"at most\n  {history.KEPT_BYTES // MIB} MiB of a lane",
        f"at most {task_budget.PER_PEER} requests",
        f"at most {task_budget.PER_KIND} of one type",
        f"at most {task_budget.LASTING_PER_PEER} of one peer",
        f"at most {MAX_PROFILE_BYTES} bytes",
        f"**window** of {messages.STEP_WINDOW} steps",
        f"at most {meshd.bounds.MAX_BATCH} steps",
        f"at most {meshd.bounds.MAX_VERIFIED} tokens",
    ):
        assert expected in SPEC, expected


def test_the_features_are_listed() -> None:
    for feature in messages.FEATURES:
        assert f"`{feature}`" in SPEC


def test_the_values_of_enumerations_are_listed() -> None:
    for value in [*meshd.types.FinishReason, *messages.StepKind]:
        assert isinstance(value, Enum)
        assert f"`{value.value}`" in SPEC
