"""The texts of models: how tokens are decoded, which the daemon does itself, and how prompts are encoded, which workers do."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any, Protocol

from meshd.agents.service import ChatMessage
from meshd.agents.text.workers import Source, TextModel, TextWorkers
from meshd.errors import ModelFileError, NoChatTemplate
from meshd.models.text.token_table import TokenTable
from meshd.types import ModelCard, ModelId

log = getLogger(__name__)

BUDGET_BYTES = 64 << 20
"""Memory of the tables that are kept. Gemma's, with 262,144 tokens, takes 3 MiB. The last one is kept even if it takes more."""
MAX_UNREADABLE = 256
Prompt = tuple[ChatMessage, ...] | str | tuple[int, ...]


class PromptEncoder(Protocol):
    """Encodes one model's prompts."""

    async def text(self, text: str) -> tuple[int, ...]: ...

    async def chat(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class WorkerEncoder:
    """Implements PromptEncoder with the text workers."""

    workers: TextWorkers
    model: TextModel

    async def text(self, text: str) -> tuple[int, ...]:
        return await self.workers.encode_text(self.model, text)

    async def chat(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> tuple[int, ...]:
        return await self.workers.encode_chat(self.model, messages, variables)


@dataclass(frozen=True, slots=True)
class ModelText:
    """A model's tokens and its way to encode prompts."""

    card: ModelCard
    table: TokenTable
    chats: bool
    """Whether the model has a chat template."""
    encoder: PromptEncoder

    def max_bytes(self, context: int) -> int:
        """Size of the longest prompt that fits into `context` tokens, if every token were the longest one.

        A longer prompt can be refused before it is encoded.
        """
        return context * max(1, self.table.longest_bytes)

    async def tokens_of(self, prompt: Prompt, variables: Mapping[str, Any] | None = None) -> tuple[int, ...]:
        """Convert a prompt (chat messages, text or token ids) to token ids. The chat template gets `variables`.

        Raises: InvalidRequest, also if that takes too long or too much memory; Overloaded.
        Cancel: the prompt is not encoded if that has not begun.
        """
        if isinstance(prompt, str):
            return await self.encoder.text(prompt)
        if all(isinstance(part, int) for part in prompt):
            return tuple(part for part in prompt if isinstance(part, int))
        if not self.chats:
            raise NoChatTemplate(
                f"{self.card.name} has no chat template", param="messages", hint="use /v1/completions with a text prompt"
            )
        messages = [part.for_template() for part in prompt if isinstance(part, ChatMessage)]
        return await self.encoder.chat(messages, dict(variables or {}))


@dataclass(slots=True)
class ModelTexts:
    """Keeps the texts of the models that were used last, within `BUDGET_BYTES`."""

    workers: TextWorkers = field(default_factory=TextWorkers)
    budget_bytes: int = BUDGET_BYTES
    _kept: OrderedDict[ModelId, ModelText] = field(default_factory=OrderedDict)
    _loading: dict[ModelId, "asyncio.Task[ModelText]"] = field(default_factory=dict)
    _unreadable: OrderedDict[ModelId, str] = field(default_factory=OrderedDict)

    async def get(self, card: ModelCard, source: Source) -> ModelText:
        """Get a model's text. Requests for the same model at the same time share one load.

        Raises: ModelFileError if its tokenizer or template can't be used; the errors of `source`; Overloaded.
        Cancel: the load continues for its other callers, and for the next one.
        """
        kept = self._kept.get(card.id)
        if kept is not None:
            self._kept.move_to_end(card.id)
            return kept
        task = self._loading.get(card.id)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(card, source), name=f"text of {card.name}")
            self._loading[card.id] = task
            task.add_done_callback(lambda done: self._loaded(card.id, done))
        return await asyncio.shield(task)

    def problem(self, model: ModelId) -> str:
        """Returns: why a model's text can't be used, as far as it was tried; empty if nothing speaks against it."""
        return self._unreadable.get(model, "")

    def forget(self, model: ModelId) -> None:
        """Read a model's text anew when it is needed next. Answers that run keep the text that they have."""
        self._kept.pop(model, None)
        self._unreadable.pop(model, None)
        self.workers.forget(model)

    async def close(self) -> None:
        """End the workers. Prompts that wait fail with Unavailable."""
        await self.workers.close()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)

    async def _load(self, card: ModelCard, source: Source) -> ModelText:
        model = TextModel(card.id, card.name, source)
        try:
            loaded = await self.workers.load(model)
        except ModelFileError as error:
            self._unreadable[card.id] = str(error)
            while len(self._unreadable) > MAX_UNREADABLE:
                self._unreadable.popitem(last=False)
            raise
        self._unreadable.pop(card.id, None)
        for warning in loaded.warnings:
            log.warning("%s: %s", card.name, warning)
        table = await asyncio.to_thread(loaded.table)  # 20 ms for 262,144 tokens
        text = ModelText(card, table, loaded.chats, WorkerEncoder(self.workers, model))
        self._kept[card.id] = text
        while len(self._kept) > 1 and sum(kept.table.nbytes for kept in self._kept.values()) > self.budget_bytes:
            self._kept.popitem(last=False)
        return text

    def _loaded(self, model: ModelId, task: "asyncio.Task[ModelText]") -> None:
        del self._loading[model]
        if not task.cancelled():
            task.exception()  # every caller may have gone
