"""Encodes the prompts of new requests: refuses those that can't fit by their size, and bounds how much is encoded at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from meshd.agents.service import ChatMessage, GenerationRequest
from meshd.agents.text.model_texts import ModelText
from meshd.errors import ContextTooLong, Overloaded
from meshd.types import ModelCard

MAX_BYTES = 32 * 2**20
"""Most bytes of prompts that are encoded or wait for it: four of the largest requests that the API takes."""
_RETRY_AFTER_S = 2.0
_OPTIONAL_FIELDS = {"name": "name", "reasoning": "reasoning_content"}
"""Fields of a chat message that a template may ignore, with their names in a request."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as token ids, and the fields of its messages that had no effect on them."""

    tokens: tuple[int, ...]
    ignored: tuple[str, ...] = ()
    """Such as `messages[0].name`."""


@dataclass(slots=True)
class PromptIntake:
    """Encodes the prompts of new requests. The size of all that are encoded or wait for it is bounded; others are refused."""

    _bytes: int = 0

    async def encode(self, request: GenerationRequest, card: ModelCard, text: ModelText) -> EncodedPrompt:
        """Encode the request's prompt with the model's tokenizer and chat template.

        Raises: ContextTooLong, InvalidRequest; Overloaded if too many prompts are being encoded.
        """
        size = size_of(request.prompt)
        _check_size(request, card, text, size)
        with self._room(size):
            tokens = await text.tokens_of(request.prompt, request.template)
            ignored = await _ignored_fields(request, text, tokens)
        return EncodedPrompt(tokens, ignored)

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Count a prompt while the block runs. Raises: Overloaded."""
        if self._bytes and self._bytes + size > MAX_BYTES:
            raise Overloaded(
                f"this peer is full: {self._bytes} bytes of prompts are being encoded",
                hint="try again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._bytes += size
        try:
            yield
        finally:
            self._bytes -= size


def size_of(prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]) -> int:
    """Return the size of a prompt in bytes of UTF-8; of token ids, their number."""
    if isinstance(prompt, str):
        return _bytes_of(prompt)
    return sum(_bytes_of(part.content) if isinstance(part, ChatMessage) else 1 for part in prompt)


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _check_size(request: GenerationRequest, card: ModelCard, text: ModelText, size: int) -> None:
    """Refuse a prompt that exceeds the context even if each of its tokens is the vocabulary's longest. Raises: ContextTooLong."""
    context = min(request.mesh.context or card.spec.context_length, card.spec.context_length)
    are_ids = not isinstance(request.prompt, str) and bool(request.prompt) and isinstance(request.prompt[0], int)
    most = context if are_ids else text.max_bytes(context)
    if size > most:
        asked = f"{size} in the prompt are more" if are_ids else f"the prompt's {size} bytes are more than they can hold"
        raise ContextTooLong(f"this model's context is {context} tokens, and {asked}", hint="shorten the prompt")


async def _ignored_fields(request: GenerationRequest, text: ModelText, tokens: tuple[int, ...]) -> tuple[str, ...]:
    """Find fields of messages without which the prompt is the same: the model's template does not use them."""
    ignored: list[str] = []
    messages = [part for part in request.prompt if isinstance(part, ChatMessage)]
    for name, shown in _OPTIONAL_FIELDS.items():
        given = [index for index, message in enumerate(messages) if getattr(message, name) is not None]
        if given:
            without = tuple(msgspec.structs.replace(message, **{name: None}) for message in messages)
            if await text.tokens_of(without, request.template) == tokens:
                ignored += [f"messages[{index}].{shown}" for index in given]
    return tuple(ignored)
