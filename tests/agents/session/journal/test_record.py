"""What a session's record is made of, and which requests make none."""

from typing import Any

import msgspec
import pytest

from in_process.clusters import make_card
from in_process.journals import HandClock, record
from meshd.agents.service import GenerationRequest, MeshOptions
from meshd.agents.session.journal.record import SessionRecord, decode_record, encode_record, new_record
from meshd.errors import ContextTooLong, InvalidRequest, ProtocolViolation
from meshd.types import PeerId, TokenLogprobs

CARD = make_card()
CONTEXT, VOCAB = CARD.spec.context_length, CARD.spec.vocab


def made(prompt: tuple[int, ...] = (1, 2, 3), **fields: Any) -> SessionRecord:
    return new_record(GenerationRequest(model="tiny", prompt=prompt, **fields), CARD, prompt, PeerId("me"), HandClock(1000.0))


def test_a_record_begins_without_tokens_or_epochs() -> None:
    begun = made(max_tokens=5, stop=("x",), background=True, edge=b"e")
    assert (begun.tokens, begun.epoch, begun.finish, begun.plan) == ((), 0, "", None)
    assert (begun.model, begun.coordinator, begun.created) == (CARD.id, "me", 1000.0)
    assert (begun.max_tokens, begun.stop, begun.background, begun.edge) == (5, ("x",), True, b"e")


@pytest.mark.parametrize("prompt", [(), (VOCAB,), (-1,), (1, VOCAB, 2)])
def test_a_prompt_must_be_tokens_of_the_vocabulary(prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        made(prompt)
    assert refused.value.param == "prompt"
    assert made((0, VOCAB - 1)).prompt == (0, VOCAB - 1)


def test_an_answer_gets_by_default_what_the_context_leaves() -> None:
    assert made().max_tokens == CONTEXT - 3
    assert made(mesh=MeshOptions(context=10)).max_tokens == 7
    assert made(max_tokens=7, mesh=MeshOptions(context=10)).max_tokens == 7


@pytest.mark.parametrize("fields", [{"max_tokens": 8}, {"prompt": (1,) * 10}, {"prompt": (1,) * 11, "max_tokens": 1}])
def test_what_does_not_fit_the_context_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ContextTooLong, match="this model's context is 10 tokens"):
        made(mesh=MeshOptions(context=10), **fields)


def test_no_context_is_longer_than_the_models() -> None:
    with pytest.raises(InvalidRequest, match=f"is {CONTEXT} tokens, not {CONTEXT + 1}"):
        made(mesh=MeshOptions(context=CONTEXT + 1))


def test_a_record_survives_the_wire() -> None:
    known = record(tokens=2, finish="stop")
    assert decode_record(memoryview(encode_record(known))) == known
    with_logprobs = record(stop=("é",), edge=b"\0\xff")
    with_logprobs = msgspec.structs.replace(with_logprobs, tokens=((7, TokenLogprobs(-0.5, ((8, -1.5),))),))
    assert decode_record(encode_record(with_logprobs)) == with_logprobs


@pytest.mark.parametrize(
    "data", [b"", b"torn", encode_record(record(tokens=2))[:-1], b"\x80"], ids=["empty", "text", "cut", "no fields"]
)
def test_a_torn_record_is_a_violation_of_the_protocol(data: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="arrived torn"):
        decode_record(data)
