"""Seals jobs: requests of devices that speak only MQTT, and the chunks of the answers. `docs/fleet.md` has the format on one page.

Each job has keys of its own, one for each direction. A request is bound to the peer and to that peer's present connection to the
broker, so that it can't be sent again to another peer or after a restart. The answer's key also has a salt of the peer, so that no
key is used twice even if a job's number is.

House rules of this file: no I/O and no clock.
"""

import hashlib
import struct
from dataclasses import dataclass
from enum import StrEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from meshd.errors import PeerRefused
from meshd.types import PeerId

VERSION = 1
_HEAD = struct.Struct(">BI16s")
HEAD_BYTES = _HEAD.size
KEY_BYTES = 32


class Direction(StrEnum):
    """Which way a message goes: its own key and its own associated data."""

    REQUEST = "request"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed message in its parts."""

    seq: int
    """0, 1, 2... in each direction of a job."""
    salt: bytes
    """16 bytes. In a request, the serial of the device's key; in an answer, drawn by the peer for this answer."""
    box: bytes


def key_check(key: bytes) -> str:
    """Returns: eight hexadecimal digits that tell keys of a device apart, and say nothing about them."""
    return hashlib.sha256(b"meshd mqtt device check" + key).hexdigest()[:8]


def read_sealed(data: bytes) -> Sealed:
    """Take a message apart. Raises: PeerRefused if it is malformed."""
    if len(data) < HEAD_BYTES:
        raise PeerRefused("it is too short")
    version, seq, salt = _HEAD.unpack_from(data)
    if version != VERSION:
        raise PeerRefused(f"it is of version {version}")
    return Sealed(seq, salt, data[HEAD_BYTES:])


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSeal:
    """Seals and opens the messages of one job."""

    key: bytes
    """The device's key."""
    cluster: str
    peer: PeerId
    device: str
    job: str
    """32 hexadecimal digits."""
    since: int
    """The peer's connection to the broker, by its presence."""

    def seal(self, direction: Direction, seq: int, salt: bytes, plain: bytes) -> bytes:
        """Returns: the message to publish. The same direction, number and salt must never be used for two texts."""
        box = self._cipher(direction, salt).encrypt(_nonce(seq), plain, self._associated(direction, seq))
        return _HEAD.pack(VERSION, seq, salt) + box

    def open(self, direction: Direction, sealed: Sealed) -> bytes:
        """Returns: the text of a message. Raises: PeerRefused if it was not sealed with this key for this job."""
        try:
            return self._cipher(direction, sealed.salt).decrypt(
                _nonce(sealed.seq), sealed.box, self._associated(direction, sealed.seq)
            )
        except InvalidTag as error:
            raise PeerRefused("it is not sealed with the device's key for this job") from error

    def _cipher(self, direction: Direction, salt: bytes) -> ChaCha20Poly1305:
        info = f"meshd/1 job {direction}\n{self.peer}".encode()
        derived = HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=bytes.fromhex(self.job) + salt, info=info).derive(self.key)
        return ChaCha20Poly1305(derived)

    def _associated(self, direction: Direction, seq: int) -> bytes:
        fields = ("meshd/1 job", direction, self.cluster, self.peer, self.device, self.job, self.since, seq)
        return "\n".join(map(str, fields)).encode()


def _nonce(seq: int) -> bytes:
    return seq.to_bytes(12, "big")
