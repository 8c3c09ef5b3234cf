"""Session records: how a request becomes one, which requests are refused, and the encoding."""

from typing import Any

import msgspec
import pytest

from ids import peer_id
from in_process.clusters import make_card
from in_process.journals import SECRET, HandClock, S, named, record
from meshd.agents.service import GenerationRequest, MeshOptions
from meshd.agents.session.journal.record import SessionRecord, decode_record, encode_record, first_part, new_record, token_bytes
from meshd.errors import ContextTooLong, InvalidRequest, ProtocolViolation
from meshd.types import TokenLogprobs

CARD = make_card()
CONTEXT, VOCAB = CARD.spec.context_length, CARD.spec.vocab


def made(prompt: tuple[int, ...] = (1, 2, 3), **fields: Any) -> SessionRecord:
    request = GenerationRequest(model="tiny", prompt=prompt, **fields)
    return new_record(request, CARD, prompt, peer_id("me"), SECRET, HandClock(1000.0))


def test_the_session_and_the_key_follow_from_the_secret_of_the_answers_id() -> None:
    begun = made()
    assert begun.session == S
    assert SECRET not in (begun.key, begun.session)
    assert begun.key != begun.session


def test_a_record_whose_key_is_not_the_sessions_is_refused() -> None:
    """Only a peer that was given the session's record has its key: the id alone is known to many."""
    forged = msgspec.structs.replace(record(named("mine")), session=S)
    with pytest.raises(ProtocolViolation, match="its key is wrong"):
        decode_record(encode_record(forged))


def test_a_record_begins_without_tokens_or_epochs() -> None:
    begun = made(max_tokens=5, stop=("x",), background=True, renderer=b"e")
    assert (begun.tokens, begun.epoch, begun.finish, begun.plan) == ((), 0, "", None)
    assert (begun.model, begun.coordinator, begun.created) == (CARD.id, peer_id("me"), 1000.0)
    assert (begun.max_tokens, begun.stop, begun.background, begun.renderer) == (5, ("x",), True, b"e")


@pytest.mark.parametrize("prompt", [(), (VOCAB,), (-1,), (1, VOCAB, 2)])
def test_a_prompt_must_be_tokens_of_the_vocabulary(prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        made(prompt)
    assert refused.value.param == "prompt"
    assert made((0, VOCAB - 1)).prompt == (0, VOCAB - 1)


def test_max_tokens_is_by_default_what_the_context_leaves() -> None:
    assert made().max_tokens == CONTEXT - 3
    assert made().open_ended
    assert not made(max_tokens=CONTEXT - 3).open_ended, "a client that names a limit gets it or an error"
    assert not made(mesh=MeshOptions(context=100)).open_ended
    assert made(mesh=MeshOptions(context=10)).max_tokens == 7
    assert made(max_tokens=7, mesh=MeshOptions(context=10)).max_tokens == 7


@pytest.mark.parametrize("fields", [{"max_tokens": 8}, {"prompt": (1,) * 10}, {"prompt": (1,) * 11, "max_tokens": 1}])
def test_a_request_that_does_not_fit_the_context_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ContextTooLong, match="this model's context is 10 tokens"):
        made(mesh=MeshOptions(context=10), **fields)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=f"is {CONTEXT} tokens, not {CONTEXT + 1}"):
        made(mesh=MeshOptions(context=CONTEXT + 1))


def test_a_record_survives_the_wire() -> None:
    known = record(tokens=2, finish="stop")
    assert decode_record(memoryview(encode_record(known))) == known
    with_logprobs = record(stop=("é",), renderer=b"\0\xff")
    with_logprobs = msgspec.structs.replace(with_logprobs, tokens=((7, TokenLogprobs(-0.5, ((8, -1.5),))),))
    assert decode_record(encode_record(with_logprobs)) == with_logprobs
    assert msgspec.msgpack.decode(encode_record(with_logprobs))["edge"] == b"\0\xff", "the key of `renderer` on the wire"


@pytest.mark.parametrize(
    "data", [b"", b"torn", encode_record(record(tokens=2))[:-1], b"\x80"], ids=["empty", "text", "cut", "no fields"]
)
def test_a_record_that_cannot_be_decoded_is_a_protocol_violation(data: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="cannot be decoded"):
        decode_record(data)


def test_a_record_with_an_unknown_end_is_refused() -> None:
    with pytest.raises(ProtocolViolation, match="an end that there is not: over"):
        decode_record(encode_record(record(finish="over")))


def test_the_first_part_of_an_ended_record_can_only_be_resumed() -> None:
    whole = record(tokens=5, finish="stop")
    assert first_part(whole, 5 * token_bytes((100, None))) == whole
    part = first_part(whole, 5 * token_bytes((100, None)) - 1)
    assert part == record(tokens=4, suspended=True)
    top = tuple((200_000 + rank, -1.23456789 * rank) for rank in range(20))
    for token in ((200_000, None), (1 << 31, TokenLogprobs(-1.5, top)), (5, TokenLogprobs(-1.5, ()))):
        assert len(msgspec.msgpack.encode(token)) <= token_bytes(token)


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": -1},
        {"epoch": 2**62},
        {"max_tokens": 2**40},
        {"prompt": [-1]},
        {"prompt": [2**33]},
        {"tokens": [[2**62, None]]},
        {"created": float("nan")},
        {"finish": "\x1b[2J"},
        {"stop": ["x"] * 17},
        {"coordinator": "x"},
        {"coordinators": [peer_id("x")] * 17},
        {"coordinators": ["x" * 1000]},
        {"sampling": {"logit_bias": dict.fromkeys(range(1025), 1.0)}},
        {"sampling": {"temperature": float("inf")}},
        {"mesh": {"peers": ["\x1b[2J"]}},
        {"mesh": {"context": 2**62}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_record_whose_values_are_out_of_bounds_is_refused(changes: dict[str, Any]) -> None:
    body = msgspec.msgpack.decode(encode_record(made()))
    assert decode_record(msgspec.msgpack.encode(body)) == made()
    with pytest.raises(ProtocolViolation, match="cannot be decoded"):
        decode_record(msgspec.msgpack.encode(body | changes))
