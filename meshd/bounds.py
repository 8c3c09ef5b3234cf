"""The bounds of every value that a peer may send: one named type for each kind of number, text and id.

msgspec checks them when it decodes a message, a session's record or a manifest. A value out of bounds makes the message malformed
(`protocol/SPEC.md`, section 6). Nothing is checked when a struct is created in Python; `protocol.codec.encode` checks what is sent.

A float's bounds exclude infinity and NaN. `title` is the type's name in SPEC.md.
"""

import re
from typing import Annotated, Any

from msgspec import Meta

MAX_LAYERS = 1024
"""Most layers of a model. The deepest models that are published have less than 200."""
MAX_TOKENS = 1 << 26
"""Most tokens of a context, of an answer or of the KV of one load: 67 million. The longest published context has 10 million."""
MAX_INT32 = (1 << 31) - 1
MAX_INT64 = (1 << 63) - 1
"""The largest bound that msgspec can check."""
MAX_BYTES = 1 << 53
"""8 PiB. Up to here, floats hold sizes exactly."""
MAX_PEERS = 256
"""Most peers of a cluster that a message can list."""
MAX_MQTT_DEVICES = 256
"""Most devices with a key for jobs over MQTT, those with a revoked key included."""
MAX_COORDINATORS = 16
"""Earlier coordinators that a session's record names. KV of one that is not named any more is computed again."""
MAX_BATCH = 64
"""Most steps in one frame, and most sessions that a stage computes in one pass. Their headers fit in 64 KiB."""
MAX_VERIFIED = 32
"""Most tokens of a step that verifies guesses. Longer guesses are rarely right to their end."""
MAX_LISTED = 1024
"""Most entries of a list that has no closer bound."""
MAX_LOGIT_BIAS = 1024
"""Most entries of `logit_bias`. With them, OPEN's header still fits 64 KiB."""
MAX_KINDS = 64
"""Most kinds of weights that a message can list. GGUF has about 40."""
MAX_TOP_LOGPROBS = 20
MAX_CONTEXT_CLASSES = 16
"""Most classes of contexts for which a peer advertises factors."""
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LABEL = 512
MAX_TEXT = 4096
MAX_ADDRESS = 300

UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
"""Characters that change a terminal's state or hide text: control characters, direction marks and invisible ones. A regex class."""
_UNPRINTABLE = re.compile(f"[{UNPRINTABLE}]")


def _int(title: str, least: int, most: int) -> Meta:
    return Meta(title=title, ge=least, le=most)


def _float(title: str, least: float, most: float) -> Meta:
    return Meta(title=title, ge=least, le=most)


Count = Annotated[int, _int("Count", 0, MAX_INT32)]
Serial = Annotated[int, _int("Serial", 0, MAX_INT64)]
"""A number that is drawn at random or counts messages: of a request, a link, an incarnation, a revision."""
Seed = Annotated[int, _int("Seed", -MAX_INT64 - 1, MAX_INT64)]
TopLogprobs = Annotated[int, _int("TopLogprobs", 0, MAX_TOP_LOGPROBS)]
Epoch = Annotated[int, _int("Epoch", 0, MAX_INT32)]
Tokens = Annotated[int, _int("Tokens", 0, MAX_TOKENS)]
"""A number of tokens, or a position among them."""
StepTokens = Annotated[int, _int("StepTokens", 1, MAX_TOKENS)]
"""The length of a step, in tokens."""
TokenId = Annotated[int, _int("TokenId", 0, MAX_INT32)]
LayerIndex = Annotated[int, _int("LayerIndex", 0, MAX_LAYERS)]
"""A layer, or the end of a run of layers."""
LayerCount = Annotated[int, _int("LayerCount", 1, MAX_LAYERS)]
StageIndex = Annotated[int, _int("StageIndex", 0, MAX_PEERS - 1)]
StageCount = Annotated[int, _int("StageCount", 0, MAX_PEERS)]
Width = Annotated[int, _int("Width", 1, 1 << 24)]
"""A dimension of a model's tensors."""
Size = Annotated[int, _int("Size", 0, MAX_BYTES)]
"""Bytes, or parameters."""
Millis = Annotated[int, _int("Millis", 0, MAX_INT32)]
Port = Annotated[int, _int("Port", 0, 65535)]

Seconds = Annotated[float, _float("Seconds", 0.0, 1e9)]
Timestamp = Annotated[float, _float("Timestamp", 0.0, 1e12)]
"""The reading of a clock in seconds."""
Rate = Annotated[float, _float("Rate", 0.0, 1e18)]
"""Bytes or FLOP per second."""
Fraction = Annotated[float, _float("Fraction", 0.0, 1.0)]
Watts = Annotated[float, _float("Watts", 0.0, 1e6)]
Celsius = Annotated[float, _float("Celsius", 0.0, 200.0)]
Factor = Annotated[float, _float("Factor", 0.0, 1e18)]
Temperature = Annotated[float, _float("Temperature", 0.0, 100.0)]
Penalty = Annotated[float, _float("Penalty", -100.0, 100.0)]
AskedTemperature = Annotated[float, _float("AskedTemperature", 0.0, 2.0)]
"""What a request may ask for, and a model recommend. The same holds for the next two."""
AskedPenalty = Annotated[float, _float("AskedPenalty", -2.0, 2.0)]
AskedRepetition = Annotated[float, _float("AskedRepetition", 0.01, 10.0)]
"""Smaller factors overflow: the repetition penalty divides scores by them."""
Logprob = Annotated[float, _float("Logprob", -1e40, 1.0)]
"""The natural logarithm of a probability. Rounding can lift it above 0."""

Word = Annotated[str, Meta(title="Word", max_length=64, pattern=r"\A[A-Za-z0-9_.+-]*\Z")]
"""A name from a fixed list, such as a state, an error's code or an element type."""
PeerName = Annotated[str, Meta(title="PeerName", pattern=rf"\A[^\s,:/{UNPRINTABLE}]{{1,63}}\Z")]
"""What `meshd.values.parse_name` accepts, with the letters of all languages. Lists of stages are written `name:0-12,name:12-30`."""
Label = Annotated[str, Meta(title="Label", max_length=MAX_LABEL, pattern=rf"\A[^{UNPRINTABLE}]*\Z")]
"""A short text that people see: a model's name, a version, a processor."""
Text = Annotated[str, Meta(title="Text", max_length=MAX_TEXT, pattern=rf"\A[^{UNPRINTABLE}]*\Z")]
"""A sentence that people see, or a path."""
Address = Annotated[str, Meta(title="Address", max_length=MAX_ADDRESS, pattern=r"\A[\x21-\x7e]*\Z")]
"""`HOST:PORT`."""
Digest = Annotated[str, Meta(title="Digest", pattern=r"\A[0-9a-f]{32}\Z")]
"""The first half of a SHA-256."""
Sha256 = Annotated[str, Meta(title="Sha256", pattern=r"\A[0-9a-f]{64}\Z")]


def at_most(count: int) -> Meta:
    """Bound the number of entries of a list or map."""
    return Meta(max_length=count)


def from_one_to(count: int) -> Meta:
    """Bound the number of entries of a list that must not be empty."""
    return Meta(min_length=1, max_length=count)


def printable(text: str, limit: int | None = None, *, keep: str = "") -> str:
    """Replace the characters that a `Text` must not have, except those in `keep`, and cut the text to `limit` characters.

    White space becomes a space, another character its escape, such as `\\x1b`.
    """

    def replace(found: re.Match[str]) -> str:
        character = found[0]
        if character in keep:
            return character
        return " " if character.isspace() else character.encode("unicode_escape").decode()

    shown = _UNPRINTABLE.sub(replace, text)
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 3]}..."


def describe(meta: Meta) -> str:
    """Write a type's bounds as SPEC.md does, such as `0 to 65535`."""
    parts: list[Any] = []
    if meta.ge is not None:
        parts.append(f"{meta.ge} to {meta.le}")
    if meta.max_length is not None:
        parts.append(f"at most {meta.max_length} characters")
    if meta.pattern is not None:
        parts.append(f"`{meta.pattern}`")
    return ", ".join(parts)
