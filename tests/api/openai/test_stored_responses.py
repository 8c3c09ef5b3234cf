from typing import Any

import pytest

from meshd.api.openai.chat.renderer import ChatRenderer
from meshd.api.openai.completions.renderer import CompletionRenderer
from meshd.api.openai.stored_responses import AnyRenderer, decode_renderer, encode_renderer, secret_of
from meshd.errors import UnknownSession

SESSION = "5e" * 16
HEAD: dict[str, Any] = {"created": 1, "model": "m", "system_fingerprint": "fp_0", "include_usage": True}
CHAT = ChatRenderer(**HEAD, logprobs=True)
COMPLETION = CompletionRenderer(**HEAD, logprobs=None, echoes=("ü",))


@pytest.mark.parametrize("renderer", [CHAT, COMPLETION])
def test_a_decoded_renderer_equals_the_encoded_one(renderer: AnyRenderer) -> None:
    assert decode_renderer(encode_renderer(renderer), renderer.prefix + SESSION) == renderer


@pytest.mark.parametrize("encoded", [b"", b"\xc1", encode_renderer(CHAT)[:-1], b"\x81\xa4form\xa5other", b"\x91" * 5000])
def test_a_record_that_can_not_be_read_is_an_unknown_session(encoded: bytes) -> None:
    with pytest.raises(UnknownSession):
        decode_renderer(encoded, f"chatcmpl-{SESSION}")


def test_an_id_of_another_route_is_unknown() -> None:
    with pytest.raises(UnknownSession):
        decode_renderer(encode_renderer(CHAT), f"cmpl-{SESSION}")


def test_an_answer_that_is_not_stored_is_unknown() -> None:
    with pytest.raises(UnknownSession):
        decode_renderer(encode_renderer(ChatRenderer(**HEAD, logprobs=False, store=False)), f"chatcmpl-{SESSION}")


def test_the_secret_is_the_end_of_the_answers_id() -> None:
    assert secret_of(f"resp_{SESSION}") == SESSION


@pytest.mark.parametrize(
    "answer_id", ["", SESSION, f"resp_{SESSION[1:]}", f"resp_{SESSION}\n", f"resp_{SESSION.upper()}", f"msg_{SESSION}"]
)
def test_other_ids_are_unknown(answer_id: str) -> None:
    with pytest.raises(UnknownSession):
        secret_of(answer_id)
