"""The exchange of keys of a pairing: SPAKE2 over the code, proofs of both sides, and sealed messages. SPEC.md, section 13.

SPAKE2's key depends on the certificate of the inviter's TLS listener (channel binding `tls-server-end-point`, RFC 5929). Somebody
in the middle has another certificate towards the joiner, so the two sides get different keys and neither proof fits.

Each try lets a stranger test one code, and only after the inviter has sent its proof. So the inviter counts tries before it
answers. The computations take some 20 ms each, in pure Python: call `answer` and `finish` in a thread.
"""

import hmac
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from spake2 import SPAKE2_A, SPAKE2_B, SPAKEError  # type: ignore[import-untyped]

from meshd.errors import PeerRefused, ProtocolViolation
from meshd.protocol.pairing.code import InviteCode

CONTEXT = b"meshd invite 1 "
_KEY_BYTES = 32


class WrongCode(PeerRefused):
    """The other side does not know the code, or is not who the channel leads to."""


class _Keys:
    """The keys that follow from SPAKE2's."""

    def __init__(self, secret: bytes, transcript: bytes) -> None:
        self._transcript = transcript
        derived = {
            label: HKDF(algorithm=hashes.SHA256(), length=_KEY_BYTES, salt=b"meshd", info=CONTEXT + label).derive(secret)
            for label in (b"inviter proof", b"joiner proof", b"inviter seal", b"joiner seal")
        }
        self.inviter_proof = self._proof(derived[b"inviter proof"])
        self.joiner_proof = self._proof(derived[b"joiner proof"])
        self.from_inviter = _Seal(derived[b"inviter seal"])
        self.from_joiner = _Seal(derived[b"joiner seal"])

    def _proof(self, key: bytes) -> bytes:
        return hmac.digest(key, self._transcript, "sha256")


class _Seal:
    """Seals the messages of one direction, or opens them, in their order."""

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._number = 0

    def _nonce(self) -> bytes:
        self._number += 1
        return self._number.to_bytes(12, "big")

    def seal(self, data: bytes) -> bytes:
        return self._cipher.encrypt(self._nonce(), data, None)

    def open(self, sealed: bytes) -> bytes:
        """Raises: ProtocolViolation if it was not sealed with this key, as the next message of its direction."""
        try:
            return self._cipher.decrypt(self._nonce(), sealed, None)
        except InvalidTag as error:
            raise ProtocolViolation("a sealed message can't be opened") from error


class InviterSide:
    """The inviter's side of one try."""

    def __init__(self, code: InviteCode, fingerprint: bytes, random_bytes: Callable[[int], bytes]) -> None:
        """`fingerprint`: SHA-256 of the certificate (DER) of the inviter's listener."""
        self._spake = SPAKE2_B(
            code.password, idA=CONTEXT + b"joiner", idB=CONTEXT + b"inviter" + fingerprint, entropy_f=random_bytes
        )
        self._keys: _Keys | None = None

    def answer(self, share: bytes) -> tuple[bytes, bytes]:
        """Take the joiner's share. Returns: the inviter's share and proof. Raises: ProtocolViolation."""
        own: bytes = self._spake.start()
        self._keys = _finished(self._spake, share, share + own)
        return own, self._keys.inviter_proof

    def check(self, proof: bytes) -> None:
        """Check the joiner's proof. Raises: WrongCode."""
        if not hmac.compare_digest(proof, self._known.joiner_proof):
            raise WrongCode("the other device has another code")

    def open(self, sealed: bytes) -> bytes:
        """Open the joiner's next sealed message. Raises: ProtocolViolation."""
        return self._known.from_joiner.open(sealed)

    def seal(self, data: bytes) -> bytes:
        """Seal a message to the joiner. Only after `check`."""
        return self._known.from_inviter.seal(data)

    @property
    def _known(self) -> _Keys:
        assert self._keys is not None, "`answer` comes first"
        return self._keys


class JoinerSide:
    """The joiner's side of one try."""

    def __init__(self, code: InviteCode, fingerprint: bytes, random_bytes: Callable[[int], bytes]) -> None:
        """`fingerprint`: SHA-256 of the certificate (DER) that the listener showed in TLS."""
        self._spake = SPAKE2_A(
            code.password, idA=CONTEXT + b"joiner", idB=CONTEXT + b"inviter" + fingerprint, entropy_f=random_bytes
        )
        self._share: bytes = self._spake.start()
        self._keys: _Keys | None = None

    @property
    def share(self) -> bytes:
        return self._share

    def finish(self, share: bytes, proof: bytes) -> bytes:
        """Take the inviter's share and proof. Returns: the joiner's proof. Raises: WrongCode, ProtocolViolation."""
        keys = _finished(self._spake, share, self._share + share)
        if not hmac.compare_digest(proof, keys.inviter_proof):
            raise WrongCode("the inviter has another code")
        self._keys = keys
        return keys.joiner_proof

    def open(self, sealed: bytes) -> bytes:
        """Open the inviter's next sealed message. Raises: ProtocolViolation."""
        return self._known.from_inviter.open(sealed)

    def seal(self, data: bytes) -> bytes:
        """Seal a message to the inviter."""
        return self._known.from_joiner.seal(data)

    @property
    def _known(self) -> _Keys:
        assert self._keys is not None, "`finish` comes first"
        return self._keys


def _finished(spake: object, share: bytes, transcript: bytes) -> _Keys:
    try:
        secret: bytes = spake.finish(share)  # type: ignore[attr-defined]
    except (SPAKEError, ValueError) as error:
        raise ProtocolViolation("the other side's share is no point of the group") from error
    return _Keys(secret, CONTEXT + transcript)
