"""Signed statements: what a peer says where no link carries it, such as its presence at an MQTT broker.

A statement is three lines of ASCII, so that people and other tools can read it:

    the body, as JSON on one line
    base64 of the peer's certificate (DER)
    base64 of the Ed25519 signature

The signature is over `meshd/1 KIND`, a line feed, and the first line. KIND names what the statement is about, so that a signature
can't be used for another purpose. A receiver checks the certificate against the cluster's authority, so it knows that the peer
belongs to the cluster before it opens a connection. Nothing here prevents a repetition: the body must have a date.
"""

import base64
import binascii
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from meshd.errors import PeerRefused
from meshd.protocol.identity import Identity, peer_id
from meshd.types import PeerId

_REMEMBERED = 256
"""Certificates that are known to be good, so that a later statement of the same peer costs one check of a signature, not two."""
_SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement in its parts. Nothing is checked yet but the form."""

    body: bytes
    certificate: bytes
    signature: bytes
    peer: PeerId
    """The id of the certificate's key."""
    key: Ed25519PublicKey


def make_statement(identity: Identity, kind: str, body: bytes) -> bytes:
    """Sign a body, which must have no line feed. Returns: the three lines."""
    signature = identity.private.sign(_signed(kind, body))
    return b"\n".join((body, base64.b64encode(identity.certificate), base64.b64encode(signature)))


def read_statement(data: bytes) -> Statement:
    """Take a statement apart. Checks no signature. Raises: PeerRefused if it is malformed."""
    lines = data.split(b"\n")
    if len(lines) != 3:
        raise PeerRefused("it has not three lines")
    try:
        certificate = base64.b64decode(lines[1], validate=True)
        signature = base64.b64decode(lines[2], validate=True)
        key = x509.load_der_x509_certificate(certificate).public_key()
    except (binascii.Error, ValueError, UnsupportedAlgorithm) as error:
        raise PeerRefused(f"its certificate or signature can't be read: {error}") from error
    if not isinstance(key, Ed25519PublicKey) or len(signature) != _SIGNATURE_BYTES:
        raise PeerRefused("its certificate or signature is not of Ed25519")
    return Statement(lines[0], certificate, signature, peer_id(key), key)


@dataclass(slots=True)
class StatementChecker:
    """Checks that statements come from members of a cluster."""

    identity: Callable[[], Identity]
    """Returns this peer's present identity. Its cluster key changes with a rotation."""
    belongs: Callable[[PeerId], bool] = lambda peer: False
    """Whether a peer belongs to the cluster whatever the authority of its certificate. Of two peers, one of which was off during
    a rotation, neither has a certificate of the other's authority, yet they must meet so that it can return. The signature proves
    the id."""
    _authority: bytes = b""
    """The authority under which `_members` were found good."""
    _members: OrderedDict[PeerId, bytes] = field(default_factory=OrderedDict)
    """The certificates that were found good, the least recently used first."""

    def check(self, kind: str, statement: Statement) -> None:
        """Check the certificate and the signature. Raises: PeerRefused.

        An unknown certificate costs a second check of a signature.
        """
        issuer = self.identity().key.issuer
        if issuer.public != self._authority:
            self._authority = issuer.public
            self._members.clear()
        known = self._members.get(statement.peer) == statement.certificate
        if not known and not issuer.has_signed(statement.certificate) and not self.belongs(statement.peer):
            raise PeerRefused("its certificate is not of this cluster")
        try:
            statement.key.verify(statement.signature, _signed(kind, statement.body))
        except InvalidSignature as error:
            raise PeerRefused("its signature is wrong") from error
        self._members[statement.peer] = statement.certificate
        self._members.move_to_end(statement.peer)
        while len(self._members) > _REMEMBERED:
            self._members.popitem(last=False)


def _signed(kind: str, body: bytes) -> bytes:
    return b"meshd/1 " + kind.encode() + b"\n" + body
