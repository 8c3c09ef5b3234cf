"""Session records: how a request becomes one, which requests are refused, and the encoding."""

from typing import Any

import msgspec
import pytest

from ids import peer_id
from in_process.clusters import make_card
from in_process.journals import HandClock, record
from meshd.agents.service import GenerationRequest, MeshOptions
from meshd.agents.session.journal.record import SessionRecord, decode_record, encode_record, new_record
from meshd.errors import ContextTooLong, InvalidRequest, ProtocolViolation
from meshd.types import TokenLogprobs

CARD = make_card()
CONTEXT, VOCAB = CARD.spec.context_length, CARD.spec.vocab


def made(prompt: tuple[int, ...] = (1, 2, 3), **fields: Any) -> SessionRecord:
    return new_record(GenerationRequest(model="tiny", prompt=prompt, **fields), CARD, prompt, peer_id("me"), HandClock(1000.0))


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
