"""Records and chains of rotations: what is refused, and that every order of arrival ends with the same one."""

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import ProtocolViolation
from meshd.protocol.cluster_key import peer_id
from meshd.protocol.owner import OwnerKey
from meshd.protocol.trust import (
    MAX_CHAIN_BYTES,
    MAX_OWNER_CHANGES,
    MAX_STAYING,
    RotationChain,
    RotationRecord,
    Standing,
    peer_bytes,
    sign_rotation,
)
from meshd.types import PeerId

OWNER = OwnerKey.from_seed(b"o" * 32)
NEXT = OwnerKey.from_seed(b"n" * 32)
STRANGER = OwnerKey.from_seed(b"s" * 32)
PEERS = tuple(peer_id(OwnerKey.from_seed(bytes([number]) * 32).private.public_key()) for number in range(4))
FIRST = RotationChain(OWNER.hash)


def rotation(
    generation: int,
    number: int = 0,
    owner: OwnerKey = OWNER,
    new_owner: OwnerKey | None = None,
    peers: tuple[PeerId, ...] = PEERS,
    previous: bytes = bytes(32),
) -> RotationRecord:
    return sign_rotation(
        owner,
        generation=generation,
        authority=hashlib.sha256(b"%d" % number).digest(),
        peers=peers,
        previous=previous,
        at=1_780_000_000,
        new_owner=None if new_owner is None else new_owner.public,
    )


def test_a_chain_is_read_as_it_was_written() -> None:
    chain = FIRST.extended(rotation(1)).extended(rotation(2, new_owner=NEXT)).extended(rotation(3, owner=NEXT))
    assert RotationChain.decode(OWNER.hash, chain.encode()) == chain
    assert len(chain.records) == 2, "the record of generation 1 is not needed to check the others"
    assert chain.owner == NEXT.hash
    assert set(chain.records[-1].peers) == set(PEERS)


def test_only_the_owner_extends_a_chain() -> None:
    with pytest.raises(ProtocolViolation, match="not signed by the cluster's owner"):
        FIRST.extended(rotation(1, owner=STRANGER))
    changed = FIRST.extended(rotation(1, new_owner=NEXT))
    with pytest.raises(ProtocolViolation, match="not signed by the cluster's owner"):
        changed.extended(rotation(2, owner=OWNER))


def test_a_stranger_that_claims_to_be_the_owner_is_found_out() -> None:
    forged = replace(rotation(1, owner=STRANGER), signer=OWNER.public, owner=OWNER.public)
    with pytest.raises(ProtocolViolation, match="signature is wrong"):
        FIRST.extended(forged)


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 2},
        {"authority": b"a" * 32},
        {"owner": STRANGER.public},
        {"previous": b"p" * 32},
        {"at": 1},
        {"peers": PEERS[:1]},
        {"signature": bytes(64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_record_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolViolation, match="signature is wrong"):
        FIRST.extended(replace(rotation(1), **change))  # type: ignore[arg-type]


def test_generations_rise() -> None:
    chain = FIRST.extended(rotation(2))
    for generation in (1, 2):
        with pytest.raises(ProtocolViolation, match="after 2"):
            chain.extended(rotation(generation, 1))


@given(data=st.binary(max_size=400))
def test_bytes_that_are_no_chain_are_refused(data: bytes) -> None:
    if not data:
        return
    with pytest.raises(ProtocolViolation):
        RotationChain.decode(OWNER.hash, data)


@given(at=st.integers(0, 10_000), byte=st.integers(1, 255))
def test_a_chain_with_any_changed_byte_is_refused(at: int, byte: int) -> None:
    data = bytearray(FIRST.extended(rotation(1)).encode())
    data[at % len(data)] ^= byte
    with pytest.raises(ProtocolViolation):
        RotationChain.decode(OWNER.hash, bytes(data))


def test_a_chain_that_is_cut_off_or_has_more_than_it_needs_is_refused() -> None:
    data = FIRST.extended(rotation(1)).encode()
    for length in range(1, len(data)):
        with pytest.raises(ProtocolViolation):
            RotationChain.decode(OWNER.hash, data[:length])
    with pytest.raises(ProtocolViolation, match="does not need"):
        RotationChain.decode(OWNER.hash, data + FIRST.extended(rotation(2)).encode())
    with pytest.raises(ProtocolViolation, match="at most"):
        RotationChain.decode(OWNER.hash, bytes(MAX_CHAIN_BYTES + 1))


def test_the_longest_chain_fits() -> None:
    ids = sorted(peer_id(OwnerKey.from_seed(number.to_bytes(32, "big")).private.public_key()) for number in range(MAX_STAYING))
    chain, owner = FIRST, OWNER
    for generation in range(1, MAX_OWNER_CHANGES + 1):
        following = OwnerKey.from_seed(generation.to_bytes(32, "big"))
        chain = chain.extended(rotation(generation, owner=owner, new_owner=following, peers=tuple(ids)))
        owner = following
    chain = chain.extended(rotation(MAX_OWNER_CHANGES + 1, owner=owner, peers=tuple(ids)))
    assert len(chain.encode()) == MAX_CHAIN_BYTES
    assert RotationChain.decode(OWNER.hash, chain.encode()) == chain
    with pytest.raises(ProtocolViolation, match="more than"):
        chain.extended(rotation(MAX_OWNER_CHANGES + 2, owner=owner, new_owner=STRANGER))


def test_a_list_out_of_bounds_is_not_signed() -> None:
    with pytest.raises(ValueError, match="1 to 512 peers"):
        rotation(1, peers=())
    for generation in (0, 0x10000):
        with pytest.raises(ValueError, match="generation"):
            rotation(generation)


def test_ids_and_their_bytes_are_one_to_one() -> None:
    assert len({peer_bytes(peer) for peer in PEERS}) == len(PEERS)


def test_a_change_of_the_owner_replaces_all_that_the_old_owner_signs() -> None:
    changed = FIRST.extended(rotation(1, new_owner=NEXT))
    thief = FIRST.extended(rotation(60_000))
    assert thief.standing_of(changed) is Standing.NEWER
    assert changed.standing_of(thief) is Standing.OLDER


def test_two_changes_of_the_owner_at_once_replace_neither() -> None:
    one, other = (FIRST.extended(rotation(1, new_owner=owner)) for owner in (NEXT, STRANGER))
    assert one.standing_of(other) is other.standing_of(one) is Standing.CONFLICT
    later = other.extended(rotation(2, owner=STRANGER))
    assert one.standing_of(later) is Standing.CONFLICT


@st.composite
def histories(draw: st.DrawFn) -> list[RotationChain]:
    """Draw chains as owners make them who know any of the earlier ones, and sometimes rotate at the same moment."""
    known = [FIRST]
    for number in range(draw(st.integers(1, 7))):
        base = draw(st.sampled_from(known))
        if base.owner != OWNER.hash:
            record = rotation(base.generation + 1, number, owner=NEXT)
        elif draw(st.booleans()) or any(chain.owner_changes for chain in known):
            record = rotation(base.generation + draw(st.integers(1, 3)), number)
        else:
            record = rotation(base.generation + 1, number, new_owner=NEXT)
        known.append(base.extended(record))
    return known


@given(known=histories(), data=st.data())
def test_every_order_of_arrival_ends_with_the_same_rotation(known: list[RotationChain], data: st.DataObject) -> None:
    ends = []
    for _ in range(3):
        present = FIRST
        for chain in data.draw(st.permutations(known)):
            if present.standing_of(chain) is Standing.NEWER:
                present = chain
        ends.append(present.hash)
    assert len(set(ends)) == 1


@given(known=histories(), data=st.data())
def test_the_order_of_chains_is_one_order(known: list[RotationChain], data: st.DataObject) -> None:
    one, two, three = (data.draw(st.sampled_from(known)) for _ in range(3))
    opposite = {Standing.NEWER: Standing.OLDER, Standing.OLDER: Standing.NEWER, Standing.SAME: Standing.SAME}
    assert opposite[one.standing_of(two)] is two.standing_of(one)
    if one.standing_of(two) is two.standing_of(three) is Standing.NEWER:
        assert one.standing_of(three) is Standing.NEWER


@given(known=histories(), data=st.data())
def test_peers_that_talk_in_any_order_end_with_the_same_rotation(known: list[RotationChain], data: st.DataObject) -> None:
    """Each begins with another chain. They meet in pairs, at random, then each meets each."""
    peers = list(known)
    size = len(peers)
    meetings = data.draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=12))
    for one, other in meetings + [(one, other) for one in range(size) for other in range(size)] * 2:
        if peers[one].standing_of(peers[other]) is Standing.NEWER:
            peers[one] = peers[other]
        elif peers[other].standing_of(peers[one]) is Standing.NEWER:
            peers[other] = peers[one]
    assert len({chain.hash for chain in peers}) == 1
