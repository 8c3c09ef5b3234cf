"""Chat templates, compared with transformers' own renderer."""

from datetime import datetime

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from meshd.errors import InvalidRequest
from meshd.models.files.gguf import GgufFile
from meshd.models.text.template import ChatTemplate, template_from_gguf
from texts import chat_templates

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]


def render(source: str) -> str:
    return ChatTemplate(source, bos="<s>", eos="</s>", now=lambda: datetime(2026, 11, 23, 7)).render(MESSAGES)


def test_the_real_models_template(smollm2: GgufFile) -> None:
    template = template_from_gguf(smollm2.metadata)
    assert template.render(MESSAGES[:1]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
    )
    closed = template.render([{"role": "system", "content": "Be brief."}], add_generation_prompt=False)
    assert closed == "<|im_start|>system\nBe brief.<|im_end|>\n"


def test_a_long_conversation_is_within_the_bounds(smollm2: GgufFile) -> None:
    messages = [{"role": "user", "content": "x" * 1000}] * 4000
    assert len(template_from_gguf(smollm2.metadata).render(messages)) > 4_000_000


@pytest.mark.parametrize("conversation", chat_templates.CONVERSATIONS)
@pytest.mark.parametrize("family", chat_templates.TEMPLATES)
def test_the_template_of_every_family_renders_as_in_transformers(family: str, conversation: str) -> None:
    source = chat_templates.TEMPLATES[family]
    messages, given = chat_templates.CONVERSATIONS[conversation]
    template = ChatTemplate(source, bos="<s>", eos="</s>")
    wanted = chat_templates.as_transformers_takes(given)
    refused = ""
    try:
        [expected], _ = render_jinja_template([messages], chat_template=source, bos_token="<s>", eos_token="</s>", **wanted)
    except (TemplateError, TypeError) as error:
        refused = str(error)
    if not refused:
        assert template.render(messages, **given) == expected
        return
    with pytest.raises(InvalidRequest) as caught:
        template.render(messages, **given)
    assert refused in caught.value.message


def test_most_conversations_are_not_refused() -> None:
    refused = 0
    for source in chat_templates.TEMPLATES.values():
        template = ChatTemplate(source)
        for messages, given in chat_templates.CONVERSATIONS.values():
            try:
                assert template.render(messages, **given)
            except InvalidRequest:
                refused += 1
    assert refused < len(chat_templates.TEMPLATES) * len(chat_templates.CONVERSATIONS) / 4


def test_a_conversation_with_tools_uses_the_files_separate_template() -> None:
    metadata = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "{{ tools | length }} tools"}
    template = template_from_gguf(metadata)
    assert template.render(MESSAGES) == "plain"
    assert template.render(MESSAGES, tools=chat_templates.TOOLS) == "2 tools"
    assert template_from_gguf({"tokenizer.chat_template": "plain"}).render(MESSAGES, tools=[]) == "plain"


@pytest.mark.parametrize("name", ["bos_token", "documents", "messages"])
def test_a_templates_own_variables_can_not_be_set(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        ChatTemplate("x").render(MESSAGES, variables={name: "x"})


def test_the_templates_own_error_message_reaches_the_client() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


def test_a_model_without_a_template_can_not_chat() -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        template_from_gguf({})
    assert "/v1/completions" in caught.value.hint
