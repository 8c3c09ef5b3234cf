"""SPAKE2, the proofs and the seals of a pairing."""

import json
import os
from pathlib import Path

import pytest

from meshd.errors import ProtocolViolation
from meshd.protocol.pairing.code import InviteCode
from meshd.protocol.pairing.exchange import InviterSide, JoinerSide, WrongCode

CODE = InviteCode(7, ("amber", "lion"))
HERE = bytes(range(32))
VECTOR = json.loads((Path(__file__).parents[1] / "golden" / "invite.json").read_text())


def sides(joiners: InviteCode = CODE, seen: bytes = HERE) -> tuple[InviterSide, JoinerSide]:
    return InviterSide(CODE, HERE, os.urandom), JoinerSide(joiners, seen, os.urandom)


def test_both_sides_prove_that_they_have_the_code_and_then_seal() -> None:
    inviter, joiner = sides()
    share, proof = inviter.answer(joiner.share)
    inviter.check(joiner.finish(share, proof))
    assert inviter.open(joiner.seal(b"name")) == b"name"
    assert joiner.open(inviter.seal(b"code")) == b"code"
    sealed = joiner.seal(b"")
    assert inviter.open(sealed) == b""
    with pytest.raises(ProtocolViolation):
        inviter.open(sealed)


@pytest.mark.parametrize(
    "code", [InviteCode(7, ("amber", "line")), InviteCode(8, ("amber", "lion")), InviteCode(7, ("lion", "amber"))]
)
def test_another_code_is_found_out_by_both_sides(code: InviteCode) -> None:
    inviter, joiner = sides(code)
    share, proof = inviter.answer(joiner.share)
    with pytest.raises(WrongCode):
        joiner.finish(share, proof)
    with pytest.raises(WrongCode):
        inviter.check(bytes(32))


def test_another_certificate_is_found_out_although_the_code_is_right() -> None:
    inviter, joiner = sides(seen=bytes(32))
    share, proof = inviter.answer(joiner.share)
    with pytest.raises(WrongCode):
        joiner.finish(share, proof)


def test_a_proof_sent_back_proves_nothing() -> None:
    inviter, joiner = sides()
    _, proof = inviter.answer(joiner.share)
    with pytest.raises(WrongCode):
        inviter.check(proof)


@pytest.mark.parametrize(
    "share", [b"A" + bytes(32), b"A" + b"\xff" * 32, b"B" + bytes(32), b"S" + bytes(32), b"A" + b"\x01" + bytes(31)]
)
def test_a_share_that_is_no_point_of_the_group_is_refused(share: bytes) -> None:
    inviter, _ = sides()
    with pytest.raises(ProtocolViolation):
        inviter.answer(share)


def test_the_test_vector() -> None:
    """SPEC.md, section 13. The sides draw fixed bytes for their secret scalars."""
    code = InviteCode.parse(VECTOR["code"])
    fingerprint = bytes.fromhex(VECTOR["fingerprint"])
    joiner = JoinerSide(code, fingerprint, lambda count: b"\x01" * count)
    inviter = InviterSide(code, fingerprint, lambda count: b"\x02" * count)
    share, proof = inviter.answer(joiner.share)
    own = joiner.finish(share, proof)
    inviter.check(own)
    found = {
        "code": VECTOR["code"],
        "fingerprint": VECTOR["fingerprint"],
        "joiner share": joiner.share.hex(),
        "inviter share": share.hex(),
        "inviter proof": proof.hex(),
        "joiner proof": own.hex(),
        "sealed by the joiner": joiner.seal(b"attic").hex(),
        "sealed by the inviter": inviter.seal(b"mesh-CODE").hex(),
    }
    assert found == VECTOR
