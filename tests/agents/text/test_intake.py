"""Prompts are refused by their size before they are encoded, and what is encoded at once is bounded."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from fake_api.words import CARD
from meshd.agents.service import ChatMessage, GenerationRequest, MeshOptions
from meshd.agents.text import intake
from meshd.agents.text.intake import PromptIntake
from meshd.agents.text.model_texts import ModelText, ModelTexts
from meshd.errors import ContextTooLong, Overloaded
from texts.headers import text_header

NAMED = "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}\n{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINKS = "{% for m in messages %}<{{ m.reasoning_content }}>{{ m.content }}{% endfor %}"


Texts = Callable[..., Awaitable[ModelText]]


@pytest.fixture
async def text() -> AsyncIterator[Texts]:
    """A function that makes the text of a model with this chat template."""
    started: list[ModelTexts] = []

    async def make(template: str = PLAIN) -> ModelText:
        started.append(ModelTexts())

        async def header() -> bytes:
            return text_header(template)

        return await started[-1].get(CARD, header)

    yield make
    for texts in started:
        await texts.close()


def request(prompt: object, **fields: object) -> GenerationRequest:
    return GenerationRequest(model="m", prompt=prompt, **fields)


@pytest.mark.parametrize("chat", [False, True])
async def test_a_prompt_that_cannot_fit_is_refused_without_encoding_it(text: Texts, chat: bool) -> None:
    long = "a" * 8_000_000
    prompt = (ChatMessage(role="user", content=long),) if chat else long
    began = time.thread_time()
    with pytest.raises(ContextTooLong, match=r"8000000 bytes are more than they can hold; shorten the prompt"):
        await PromptIntake().encode(request(prompt), CARD, await text())
    assert time.thread_time() - began < 1


async def test_the_limit_is_that_of_the_longest_token_and_the_context_of_the_request(text: Texts) -> None:
    model = await text()
    longest = model.max_bytes(1)
    mesh = MeshOptions(context=4)
    with pytest.raises(ContextTooLong):
        await PromptIntake().encode(request("a" * (4 * longest + 1), mesh=mesh), CARD, model)
    assert (await PromptIntake().encode(request("a" * (4 * longest), mesh=mesh), CARD, model)).tokens


async def test_more_token_ids_than_the_context_are_refused(text: Texts) -> None:
    with pytest.raises(ContextTooLong, match="1000000 in the prompt are more"):
        await PromptIntake().encode(request((1,) * 1_000_000), CARD, await text())


async def test_what_is_encoded_at_once_is_bounded_by_its_size(text: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_BYTES", 100)
    one, model = PromptIntake(), await text()
    results = await asyncio.gather(*(one.encode(request("a" * 60), CARD, model) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results[1:]] == [Overloaded, Overloaded]
    assert "being encoded" in str(results[1])
    # A single prompt is taken whatever its size, and what has ended leaves room.
    assert (await one.encode(request("a" * 120), CARD, model)).tokens


@pytest.mark.parametrize(
    ("template", "ignored"),
    [
        (NAMED, ("messages[0].reasoning_content",)),
        (PLAIN, ("messages[1].name", "messages[0].reasoning_content")),
        (THINKS, ("messages[1].name",)),
    ],
)
async def test_fields_that_the_template_does_not_use_are_named(text: Texts, template: str, ignored: tuple[str, ...]) -> None:
    messages = (
        ChatMessage(role="assistant", content="x", reasoning="y"),
        ChatMessage(role="user", content="z", name="bob"),
        ChatMessage(role="user", content="z"),
    )
    assert (await PromptIntake().encode(request(messages), CARD, await text(template))).ignored == ignored


async def test_the_name_and_the_thoughts_of_a_message_reach_the_template(text: Texts) -> None:
    bob = (ChatMessage(role="user", content="z", name="bob"),)
    model = await text(NAMED)
    assert model.table.decode((await PromptIntake().encode(request(bob), CARD, model)).tokens) == "user bob: z\n"
