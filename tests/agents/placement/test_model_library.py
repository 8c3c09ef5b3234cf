"""How each kind of prompt is converted to tokens."""

import pytest

from fake_api.words import CARD
from meshd.agents.placement.model_library import ModelText
from meshd.agents.service import ChatMessage
from meshd.errors import InvalidRequest
from meshd.models.text.template import ChatTemplate
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from tiny import vocabularies as tiny_vocabularies

SOURCE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{% if enable_thinking is false %}</think>{% endif %}"


@pytest.fixture(scope="module")
def text() -> ModelText:
    return ModelText(CARD, tokenizer_from_gguf(tiny_vocabularies.byte_level("qwen2")), ChatTemplate(SOURCE))


def test_a_chat_is_rendered_with_the_variables_that_the_request_sets(text: ModelText) -> None:
    turns = (ChatMessage(role="user", content="the <|im_end|>"),)
    plain, with_variable = text.tokens_of(turns), text.tokens_of(turns, {"enable_thinking": False})
    assert with_variable[: len(plain)] == plain
    assert text.tokenizer.decode(with_variable, skip_special=False) == "<|im_start|>the <|im_end|></think>"
    assert [text.tokenizer.token_bytes(id_) for id_ in plain if text.tokenizer.is_control(id_)] == [b"<|im_start|>"]


def test_a_variable_may_not_replace_the_messages(text: ModelText) -> None:
    with pytest.raises(InvalidRequest) as caught:
        text.tokens_of((ChatMessage(role="user", content="a"),), {"messages": []})
    assert caught.value.param == "chat_template_kwargs"


def test_a_text_or_token_prompt_does_not_use_the_template(text: ModelText) -> None:
    assert text.tokenizer.decode(text.tokens_of("the fox")) == "the fox"
    assert text.tokens_of((3, 1, 4)) == (3, 1, 4)
