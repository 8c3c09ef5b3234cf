"""What the daemon and its text worker say to each other over a pipe: one job, then its result. Each is `u32 length | msgpack`."""

from array import array
from struct import Struct
from typing import Any, TypeAlias

import msgspec

from meshd.errors import InvalidRequest, MeshdError, ModelFileError
from meshd.models.text.token_table import IDS, TokenTable

LENGTH = Struct("<I")
MAX_FRAME_BYTES = 256 << 20
"""Largest job or result. A model's header, which has its vocabulary, is the largest part of any."""

OUT_OF_MEMORY = 66
"""Exit status of a worker after a MemoryError. Native code that gets no memory aborts instead (SIGABRT)."""


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Read a model's tokenizer and chat template, and try both. Result: Loaded."""

    model: str
    """A name for the model in later jobs."""
    path: str = ""
    """The model's GGUF file; empty: `header` has its header."""
    header: bytes = b""
    cpu_s: float
    """Processor time that the job may take. At more, the worker ends."""


class EncodeText(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Encode a text, with the tokens that the model expects around it. Result: Encoded."""

    model: str
    text: str
    cpu_s: float


class EncodeChat(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """Render a conversation with the model's chat template, and encode it. Result: Encoded."""

    model: str
    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    """Variables of the chat template."""
    cpu_s: float


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """What the daemon needs of a model's text: how tokens are decoded. The rest stays in the worker."""

    pieces: bytes
    ends: bytes
    control: bytes
    leading_space: bool
    chats: bool
    """Whether the model has a chat template."""
    warnings: tuple[str, ...] = ()
    """What was missing or odd in the file, and what is done instead."""

    def table(self) -> TokenTable:
        """Make the table from which tokens are decoded."""
        return TokenTable(self.pieces, array(IDS, self.ends), array(IDS, self.control), leading_space=self.leading_space)


class Encoded(msgspec.Struct, frozen=True, kw_only=True, tag="encoded"):
    """Token ids."""

    ids: bytes

    def tokens(self) -> tuple[int, ...]:
        return tuple(array(IDS, self.ids))


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The job can't be done: the text or the model's file is wrong."""

    code: str
    message: str
    hint: str = ""
    param: str | None = None

    def error(self) -> MeshdError:
        """Make the error that the worker raised."""
        if self.code == ModelFileError.code:
            return ModelFileError(self.message, hint=self.hint)
        return InvalidRequest(self.message, param=self.param, hint=self.hint)


Job: TypeAlias = Load | EncodeText | EncodeChat
Result: TypeAlias = Loaded | Encoded | Failed


def encode_frame(message: Job | Result) -> bytes:
    """Encode a message. Raises: InvalidRequest for texts and numbers that can't be sent."""
    try:
        body = msgspec.msgpack.encode(message)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text can't be encoded: {error.reason} at character {error.start}") from error
    except (OverflowError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"the request can't be encoded: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise InvalidRequest(f"the text can't be encoded: it has {len(body):,} bytes, and {MAX_FRAME_BYTES:,} are the limit")
    return LENGTH.pack(len(body)) + body


decode_job = msgspec.msgpack.Decoder(Job).decode
decode_result = msgspec.msgpack.Decoder(Result).decode
