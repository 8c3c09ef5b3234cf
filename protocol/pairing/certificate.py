"""The certificate of one invite's listener. It is made for the invite, signed by itself, and trusted only through SPAKE2."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "meshd invite")])


@dataclass(frozen=True, slots=True)
class InviteCertificate:
    """A certificate and its private key."""

    pem: bytes
    """Both, as OpenSSL reads them from one file."""
    fingerprint: bytes
    """SHA-256 of the certificate (DER)."""


def make_certificate(random_bytes: Callable[[int], bytes]) -> InviteCertificate:
    """Make a certificate whose dates do not depend on the device's clock."""
    private = Ed25519PrivateKey.from_private_bytes(random_bytes(32))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_NAME)
        .issuer_name(_NAME)
        .public_key(private.public_key())
        .serial_number(int.from_bytes(random_bytes(16), "big") >> 1 | 1)
        .not_valid_before(datetime(1970, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
        .sign(private, None)
    )
    key = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return InviteCertificate(key + certificate.public_bytes(Encoding.PEM), fingerprint_of(certificate.public_bytes(Encoding.DER)))


def fingerprint_of(der: bytes) -> bytes:
    """Return the fingerprint of a certificate (DER)."""
    return hashlib.sha256(der).digest()
