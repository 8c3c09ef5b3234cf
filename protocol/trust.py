"""Rotations: the owner's signed decisions on the cluster's key and on the peers that stay. Pure. SPEC.md, section 12.

A record stands for itself: whoever knows the hash of the founding owner's key can check it, wherever it came from. A chain is
what a peer needs to check the newest record: the records that changed the owner key, then the newest one.
"""

import base64
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import pairwise

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from meshd.errors import ConfigError, ProtocolViolation
from meshd.protocol.owner import OwnerKey, owner_hash
from meshd.types import PeerId

MAX_STAYING = 512
"""Most peers that a record can list: twice as many as a peer can be linked with."""
MAX_OWNER_CHANGES = 8
"""Each stays in the chain for ever, because a peer that was off since before it needs it. After that, found the cluster anew."""
MAX_GENERATION = 0xFFFF
_JUMPED = MAX_GENERATION // 2
"""With a rotation each day, a cluster is 90 years old here: a thief of the owner key has jumped, to leave the owner no number."""
_MAGIC = b"meshdrot"
_FIXED = struct.Struct(">8sH32s32s32s32sQH")
_SIGNATURE_BYTES = 64
_LATEST = 10**11
"""Highest Unix time, of the year 5138, so that every date can be shown."""
_ID_BYTES = 32
_LENGTH = struct.Struct(">I")
MAX_CHAIN_BYTES = (MAX_OWNER_CHANGES + 1) * (_LENGTH.size + _FIXED.size + MAX_STAYING * _ID_BYTES + _SIGNATURE_BYTES)
NO_RECORD = bytes(32)
"""The hash of the record before the first one."""


class Standing(Enum):
    """How another chain stands to one's own."""

    SAME = "the same"
    NEWER = "it replaces one's own"
    OLDER = "one's own replaces it"
    CONFLICT = "an owner key was changed in two ways: neither replaces the other"


@dataclass(frozen=True, kw_only=True)
class RotationRecord:
    """One rotation, as it was signed. Make one with `sign_rotation` or `decode`, which check it."""

    generation: int
    authority: bytes
    """The new certificate authority's public key. The new cluster key derives it, which proves that key."""
    owner: bytes
    """Public key of the owner who may sign the next record: the signer's own, unless the owner key changes."""
    signer: bytes
    previous: bytes
    """SHA-256 of the record that the signer knew as the newest."""
    at: int
    """Unix time, for people only: no rule depends on it."""
    peers: tuple[PeerId, ...]
    """The peers that stay, in ascending order of their ids' bytes."""
    signature: bytes = b""

    @property
    def changes_owner(self) -> bool:
        return self.owner != self.signer

    @cached_property
    def body(self) -> bytes:
        """The bytes that are signed."""
        fixed = _FIXED.pack(
            _MAGIC, self.generation, self.authority, self.owner, self.signer, self.previous, self.at, len(self.peers)
        )
        return fixed + b"".join(map(peer_bytes, self.peers))

    @cached_property
    def hash(self) -> bytes:
        """SHA-256 of `body`, by which other records and peers name this one."""
        return hashlib.sha256(self.body).digest()


def sign_rotation(
    owner: OwnerKey,
    *,
    generation: int,
    authority: bytes,
    peers: Iterable[PeerId],
    previous: bytes = NO_RECORD,
    at: int,
    new_owner: bytes | None = None,
) -> RotationRecord:
    """Sign a rotation. `new_owner`: public key of the owner from now on; None: the same. Raises: ValueError if out of bounds."""
    staying = tuple(sorted(set(peers), key=peer_bytes))
    if not 0 < generation <= MAX_GENERATION or not 0 < len(staying) <= MAX_STAYING:
        raise ValueError(f"a rotation has a generation of 1 to {MAX_GENERATION} and 1 to {MAX_STAYING} peers")
    unsigned = RotationRecord(
        generation=generation,
        authority=authority,
        owner=owner.public if new_owner is None else new_owner,
        signer=owner.public,
        previous=previous,
        at=at,
        peers=staying,
    )
    return replace(unsigned, signature=owner.private.sign(unsigned.body))


@dataclass(frozen=True)
class RotationChain:
    """The rotations that lead from a cluster's founding owner to its newest record. Empty: the key was never changed."""

    founder: bytes
    """Hash of the founding owner's key, from the join code."""
    records: tuple[RotationRecord, ...] = ()

    @property
    def last(self) -> RotationRecord | None:
        return self.records[-1] if self.records else None

    @property
    def generation(self) -> int:
        return self.records[-1].generation if self.records else 0

    @property
    def hash(self) -> bytes:
        """The newest record's hash; `NO_RECORD` if there is none."""
        return self.records[-1].hash if self.records else NO_RECORD

    @property
    def owner(self) -> bytes:
        """Hash of the key that must have signed the next record."""
        return owner_hash(self.records[-1].owner) if self.records else self.founder

    @property
    def owner_changes(self) -> tuple[bytes, ...]:
        """Hashes of the records that changed the owner key."""
        return tuple(record.hash for record in self.records if record.changes_owner)

    def extended(self, record: RotationRecord) -> "RotationChain":
        """Append the next record. Raises: ProtocolViolation if this chain's owner did not sign it, or it is no next one."""
        if owner_hash(record.signer) != self.owner:
            raise ProtocolViolation("a rotation is not signed by the cluster's owner")
        kept = tuple(known for known in self.records if known.changes_owner)
        before = RotationChain(self.founder, kept) if record.changes_owner else self
        if record.generation <= before.generation:
            raise ProtocolViolation(f"a rotation has generation {record.generation}, after {before.generation}")
        _check_signature(record)
        if len(kept) + record.changes_owner > MAX_OWNER_CHANGES:
            raise ProtocolViolation(f"the owner key was changed more than {MAX_OWNER_CHANGES} times")
        return RotationChain(self.founder, (*kept, record))

    def next_generation(self, present: int, *, new_owner: bool) -> int:
        """Choose the generation of the next record; `present` is that of the cluster key. A record that changes the owner replaces
        all that the old owner has signed, whatever its generation, so that a thief who has used the highest one gains nothing.

        Raises: ConfigError if there is no further one.
        """
        following = max(self.generation, present) + 1
        if new_owner and following > _JUMPED:
            changes = [record.generation for record in self.records if record.changes_owner]
            following = max(changes, default=0) + 1
        if following > MAX_GENERATION:
            raise ConfigError(
                "the cluster key has the highest number that there is: somebody with the owner key did that on purpose",
                hint="found the cluster anew (`meshd key new --replace`)"
                if new_owner
                else "add --new-owner, and revoke that device",
            )
        return following

    def standing_of(self, other: "RotationChain") -> Standing:
        """Compare another chain of the same founder with this one. Every peer that knows both prefers the same one.

        A change of the owner key replaces all that the old owner signs, whatever its generation: the old key may be in a thief's
        hands. For the same reason it is never taken back: a chain without it is older. Otherwise the higher generation counts,
        and of two records of one generation, which two owners signed at the same moment, the one with the lower hash.
        """
        ours, theirs = self.owner_changes, other.owner_changes
        common = min(len(ours), len(theirs))
        if ours[:common] != theirs[:common]:
            return Standing.CONFLICT
        if self.hash == other.hash:
            return Standing.SAME
        return Standing.NEWER if other._rank() > self._rank() else Standing.OLDER

    def _rank(self) -> tuple[int, int, bytes]:
        inverted = bytes(255 - byte for byte in self.hash)
        return len(self.owner_changes), self.generation, inverted

    def encode(self) -> bytes:
        """Encode the chain as it is sent and stored: each record's length, body and signature."""
        return b"".join(_LENGTH.pack(len(one.body) + len(one.signature)) + one.body + one.signature for one in self.records)

    @classmethod
    def decode(cls, founder: bytes, data: bytes) -> "RotationChain":
        """Read a chain, and check its bounds and every signature. Raises: ProtocolViolation."""
        if len(data) > MAX_CHAIN_BYTES:
            raise ProtocolViolation(f"a chain of rotations has {len(data)} bytes; at most {MAX_CHAIN_BYTES} are allowed")
        chain = cls(founder)
        at = 0
        while at < len(data):
            if chain.last is not None and not chain.last.changes_owner:
                raise ProtocolViolation("a chain of rotations has a record that it does not need")
            if len(data) - at < _LENGTH.size:
                raise ProtocolViolation("a chain of rotations is cut off")
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            if len(data) - at < length:
                raise ProtocolViolation("a chain of rotations is cut off")
            chain = chain.extended(_decode_record(data[at : at + length]))
            at += length
        return chain


def peer_bytes(peer: PeerId) -> bytes:
    """Return the 32 bytes that a peer id stands for."""
    return base64.b32decode(peer.upper() + "====")


def _decode_record(data: bytes) -> RotationRecord:
    if len(data) < _FIXED.size + _SIGNATURE_BYTES:
        raise ProtocolViolation("a rotation is cut off")
    magic, generation, authority, owner, signer, previous, at, count = _FIXED.unpack_from(data)
    if magic != _MAGIC or at > _LATEST or count > MAX_STAYING or len(data) != _FIXED.size + count * _ID_BYTES + _SIGNATURE_BYTES:
        raise ProtocolViolation("a rotation is malformed")
    ids = [data[start : start + _ID_BYTES] for start in range(_FIXED.size, len(data) - _SIGNATURE_BYTES, _ID_BYTES)]
    if not ids or any(one >= other for one, other in pairwise(ids)):
        raise ProtocolViolation("a rotation lists no peers, or not in ascending order")
    return RotationRecord(
        generation=generation,
        authority=authority,
        owner=owner,
        signer=signer,
        previous=previous,
        at=at,
        peers=tuple(PeerId(base64.b32encode(one).decode().rstrip("=").lower()) for one in ids),
        signature=data[-_SIGNATURE_BYTES:],
    )


def _check_signature(record: RotationRecord) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(record.signer).verify(record.signature, record.body)
    except (InvalidSignature, ValueError) as error:
        raise ProtocolViolation("a rotation's signature is wrong") from error
