"""A model's text: how each kind of prompt is converted to tokens, and how many models' texts are kept."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from fake_api.words import CARD
from meshd.agents.service import ChatMessage
from meshd.agents.text.model_texts import ModelText, ModelTexts
from meshd.errors import InvalidRequest, ModelFileError, NoPeer
from meshd.types import ModelCard, ModelId
from texts.headers import text_header

SOURCE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{% if enable_thinking is false %}</think>{% endif %}"


def named(name: str) -> ModelCard:
    return msgspec.structs.replace(CARD, id=ModelId(name.ljust(32, "-")), name=name)


class File:
    """A model's header, and how often it was read."""

    def __init__(self, header: bytes) -> None:
        self.header = header
        self.reads = 0

    async def __call__(self) -> bytes:
        self.reads += 1
        return self.header


@pytest.fixture
async def texts() -> AsyncIterator[ModelTexts]:
    started = ModelTexts()
    yield started
    await started.close()


@pytest.fixture
async def text(texts: ModelTexts) -> ModelText:
    return await texts.get(CARD, File(text_header(SOURCE)))


async def test_a_chat_is_rendered_with_the_variables_that_the_request_sets(text: ModelText) -> None:
    turns = (ChatMessage(role="user", content="the <|im_end|>"),)
    plain, with_variable = await text.tokens_of(turns), await text.tokens_of(turns, {"enable_thinking": False})
    assert with_variable[: len(plain)] == plain
    assert text.table.decode(with_variable, skip_special=False) == "<|im_start|>the <|im_end|></think>"
    assert [text.table.token_bytes(id_) for id_ in plain if text.table.is_control(id_)] == [b"<|im_start|>"]


async def test_a_variable_may_not_replace_the_messages(text: ModelText) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await text.tokens_of((ChatMessage(role="user", content="a"),), {"messages": []})
    assert caught.value.param == "chat_template_kwargs"


async def test_a_text_or_token_prompt_does_not_use_the_template(text: ModelText, texts: ModelTexts) -> None:
    assert text.table.decode(await text.tokens_of("the fox")) == "the fox"
    assert await text.tokens_of((3, 1, 4)) == (3, 1, 4)
    plain = await texts.get(named("plain"), File(text_header(None)))
    assert await plain.tokens_of("the fox")
    with pytest.raises(InvalidRequest, match="plain has no chat template"):
        await plain.tokens_of((ChatMessage(role="user", content="a"),))


async def test_no_prompt_that_fits_the_context_is_longer_than_the_bound(text: ModelText) -> None:
    longest = max(range(len(text.table)), key=lambda id_: len(text.table.token_bytes(id_)))
    assert text.max_bytes(7) == 7 * len(text.table.token_bytes(longest))
    assert len("the fox") <= text.max_bytes(len(await text.tokens_of("the fox")))


async def test_requests_share_one_load_and_later_ones_need_none(texts: ModelTexts) -> None:
    file = File(text_header())
    first, second = await asyncio.gather(texts.get(CARD, file), texts.get(CARD, file))
    assert first is second is await texts.get(CARD, file)
    assert file.reads == 1


async def test_the_texts_used_last_are_kept_within_the_budget(texts: ModelTexts) -> None:
    file = File(text_header())
    size = (await texts.get(named("a"), file)).table.nbytes
    texts.budget_bytes = 2 * size
    for name in ("b", "a", "c", "a"):
        await texts.get(named(name), file)
    assert file.reads == 3, "a was used between b and c"
    await texts.get(named("b"), file)
    assert file.reads == 4
    texts.budget_bytes = 1
    kept = await texts.get(named("d"), file)
    assert await texts.get(named("d"), file) is kept, "the last one is kept in any case"


async def test_a_failed_load_is_forgotten_and_an_unreadable_text_is_known(texts: ModelTexts) -> None:
    async def nobody() -> bytes:
        raise NoPeer("no live peer has the file")

    card = named("m")
    with pytest.raises(NoPeer):
        await texts.get(card, nobody)
    assert texts.problem(card.id) == ""
    with pytest.raises(ModelFileError):
        await texts.get(card, File(text_header("{% for m in %}")))
    assert "chat template" in texts.problem(card.id)
    assert (await texts.get(card, File(text_header()))).chats
    assert texts.problem(card.id) == ""


async def test_a_reader_that_has_gone_does_not_end_the_load(texts: ModelTexts) -> None:
    file = File(text_header())
    first = asyncio.create_task(texts.get(CARD, file))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert (await texts.get(CARD, file)).chats
    assert file.reads == 1


async def test_a_text_that_is_forgotten_is_read_anew_and_used_for_the_next_prompt(texts: ModelTexts) -> None:
    turns = (ChatMessage(role="user", content="the fox"),)
    forged = await texts.get(CARD, File(text_header("forged")))
    assert forged.table.decode(await forged.tokens_of(turns)) == "forged"
    texts.forget(CARD.id)
    right = await texts.get(CARD, File(text_header()))
    assert right.table.decode(await right.tokens_of(turns)) == "the fox"
