"""Prompts are refused by their size before they are encoded, and what is encoded at once is bounded."""

import asyncio
import time

import pytest

from fake_api.words import CARD
from meshd.agents.placement.model_library import ModelText
from meshd.agents.service import ChatMessage, GenerationRequest, MeshOptions
from meshd.agents.session import prompt as intake
from meshd.agents.session.prompt import PromptIntake, check_sampling
from meshd.errors import ContextTooLong, InvalidRequest, Overloaded
from meshd.models.text.template import ChatTemplate
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from meshd.types import SamplingParams
from tiny import vocabularies as tiny_vocabularies

NAMED = "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}\n{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINKS = "{% for m in messages %}<{{ m.reasoning_content }}>{{ m.content }}{% endfor %}"


def text(template: str = PLAIN) -> ModelText:
    return ModelText(CARD, tokenizer_from_gguf(tiny_vocabularies.byte_level("qwen2")), ChatTemplate(template))


def request(prompt: object, **fields: object) -> GenerationRequest:
    return GenerationRequest(model="m", prompt=prompt, **fields)


@pytest.mark.parametrize("chat", [False, True])
async def test_a_prompt_that_cannot_fit_is_refused_without_encoding_it(chat: bool) -> None:
    long = "a" * 8_000_000
    prompt = (ChatMessage(role="user", content=long),) if chat else long
    began = time.thread_time()
    with pytest.raises(ContextTooLong, match=r"8000000 bytes are more than they can hold; shorten the prompt"):
        await PromptIntake().encode(request(prompt), CARD, text())
    assert time.thread_time() - began < 1


async def test_the_limit_is_that_of_the_longest_token_and_the_context_of_the_request() -> None:
    model = text()
    longest = model.max_bytes(1)
    mesh = MeshOptions(context=4)
    with pytest.raises(ContextTooLong):
        await PromptIntake().encode(request("a" * (4 * longest + 1), mesh=mesh), CARD, model)
    assert (await PromptIntake().encode(request("a" * (4 * longest), mesh=mesh), CARD, model)).tokens


async def test_more_token_ids_than_the_context_are_refused() -> None:
    with pytest.raises(ContextTooLong, match="1000000 in the prompt are more"):
        await PromptIntake().encode(request((1,) * 1_000_000), CARD, text())


async def test_what_is_encoded_at_once_is_bounded_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_BYTES", 100)
    one, model = PromptIntake(), text()
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
async def test_fields_that_the_template_does_not_use_are_named(template: str, ignored: tuple[str, ...]) -> None:
    messages = (
        ChatMessage(role="assistant", content="x", reasoning="y"),
        ChatMessage(role="user", content="z", name="bob"),
        ChatMessage(role="user", content="z"),
    )
    assert (await PromptIntake().encode(request(messages), CARD, text(template))).ignored == ignored


async def test_the_name_and_the_thoughts_of_a_message_reach_the_template() -> None:
    bob = (ChatMessage(role="user", content="z", name="bob"),)
    model = text(NAMED)
    assert model.tokenizer.decode((await PromptIntake().encode(request(bob), CARD, model)).tokens) == "user bob: z\n"


def test_a_bias_for_a_token_outside_the_vocabulary_is_refused() -> None:
    vocab = CARD.spec.vocab
    check_sampling(request("x", sampling=SamplingParams(logit_bias={vocab - 1: 1.0})), CARD)
    with pytest.raises(InvalidRequest, match="outside the vocabulary") as refused:
        check_sampling(request("x", sampling=SamplingParams(logit_bias={vocab: 1.0})), CARD)
    assert refused.value.param == "logit_bias"
