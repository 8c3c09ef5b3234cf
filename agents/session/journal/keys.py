"""Who may read a session, and who has its record: both follow from a secret in the answer's id, by hashing.

    secret        in the answer's id: the client and the session's coordinator have it
    key           hash of the secret, in the record: its deputies have it too
    session id    hash of the key: the peers with its stages know it, and every peer that was asked for the session

So a peer with the secret can prove to any holder of the record that a client sent it, and a peer with the record can prove that to
any peer that knows the secret or has the record. A peer that only knows the session's id can prove neither.
"""

import hashlib
import hmac

from meshd.agents.service import AnswerSecret
from meshd.clock import Clock
from meshd.types import PeerId, SessionId

NONCE_BYTES = 16


def new_secret(clock: Clock) -> AnswerSecret:
    """Draw the secret of a new answer: 32 hexadecimal digits."""
    return AnswerSecret(clock.random_bytes(16).hex())


def key_of(secret: AnswerSecret) -> str:
    """Returns: the key of the record of the answer with this secret, 32 hexadecimal digits."""
    return _hash("meshd record", secret)


def session_with(key: str) -> SessionId:
    """Returns: the id of the session whose record has this key."""
    return SessionId(_hash("meshd session", key))


def session_of(secret: AnswerSecret) -> SessionId:
    """Returns: the id of the session of the answer with this secret."""
    return session_with(key_of(secret))


def proof_of(key: str, nonce: str, peer: PeerId) -> str:
    """Returns: the proof that `peer` has the record with this key, for a peer that drew `nonce`."""
    return hmac.digest(key.encode(), f"{nonce} {peer}".encode(), "sha256").hex()


def _hash(purpose: str, text: str) -> str:
    return hashlib.sha256(f"{purpose} {text}".encode()).hexdigest()[:32]
