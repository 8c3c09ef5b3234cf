"""The cluster key with its join code, and the certificate authorities that follow from it. Pure.

Every holder of the cluster key derives the same authority, byte for byte. Certificates are valid from 1970 to 9999, so that a
device whose clock is wrong can join. SPEC.md, section 2, specifies them, with a test vector.

A second authority, of returning peers, follows from the owner's hash, which every past member knows. Its certificates prove no
membership. They let two peers with different cluster keys talk at all, so that one can give the other the newest rotation.
"""

import base64
import datetime
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshd.errors import ConfigError
from meshd.protocol.owner import OWNER_HASH_BYTES, cluster_fingerprint
from meshd.protocol.trust import MAX_GENERATION
from meshd.types import PeerId

KEY_BYTES = 32
_CODE = struct.Struct(f">BH{KEY_BYTES}s{OWNER_HASH_BYTES}s")
_FORM = 2
_CHECK_BYTES = 4
_CODE_LETTERS = 88
_OLD_LETTERS, _OLD_CHECK_BYTES = 56, 3
"""The first form of join codes, which names no owner."""
_PREFIX = "mesh"
_GROUP = 4
_RFC4648 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ENCODE = str.maketrans(_RFC4648, _CROCKFORD)
_DECODE = str.maketrans(_CROCKFORD + "OIL", _RFC4648 + "ABB")
_SALT = b"meshd"
_AUTHORITY_INFO = b"meshd/2 certificate authority"
_RETURN_INFO = b"meshd/2 authority of returning peers"
_DEVICE_INFO = b"meshd/1 mqtt device\n"
_AUTHORITY_NAME = "meshd cluster"
_RETURN_NAME = "meshd return"
_NOT_BEFORE = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
_BOTH_ENDS = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


class Authority:
    """A certificate authority: an Ed25519 key, and the name under which it issues."""

    def __init__(self, private: Ed25519PrivateKey, name: x509.Name) -> None:
        self.private = private
        self._name = name

    @cached_property
    def public(self) -> bytes:
        """The 32 bytes of the public key."""
        return _raw(self.private.public_key())

    @cached_property
    def certificate(self) -> x509.Certificate:
        """The authority's own certificate. It is the same on every peer."""
        public = self.private.public_key()
        return (
            _certificate(public, self._name, serial=1)
            .issuer_name(self._name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.private, None)
        )

    def certify(self, public: Ed25519PublicKey) -> x509.Certificate:
        """Sign the certificate of a peer. The same key gives the same certificate."""
        digest = hashlib.sha256(_raw(public)).digest()
        return (
            _certificate(public, _name(peer_id(public)), serial=int.from_bytes(digest[:16], "big") >> 1 | 1)
            .issuer_name(self._name)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(_BOTH_ENDS, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.private.public_key()), critical=False)
            .sign(self.private, None)
        )

    def has_signed(self, der: bytes) -> bool:
        """Whether this authority's key has signed a certificate."""
        try:
            certificate = x509.load_der_x509_certificate(der)
            self.private.public_key().verify(certificate.signature, certificate.tbs_certificate_bytes)
        except (ValueError, InvalidSignature, UnsupportedAlgorithm):
            return False
        return True


@dataclass(frozen=True)
class ClusterKey:
    """The secret that all peers of a cluster share, 32 random bytes, and whose signature can replace it."""

    secret: bytes
    owner: bytes = b""
    """Hash of the owner key that founded the cluster. Without it, nobody has the owner key, and the key can't be rotated."""
    generation: int = 0
    """Number of the rotation that brought this key; 0 for a cluster's first key."""

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a cluster key has {KEY_BYTES} bytes, not {len(self.secret)}")
        if not self.owner:
            nobody = hashlib.sha256(b"meshd nobody" + self.secret).digest()[:OWNER_HASH_BYTES]
            object.__setattr__(self, "owner", nobody)
        if len(self.owner) != OWNER_HASH_BYTES or not 0 <= self.generation <= MAX_GENERATION:
            raise ValueError("the owner's hash or the generation of a cluster key is out of bounds")

    def __repr__(self) -> str:
        return f"ClusterKey({self.generation} of {self.fingerprint})"

    @classmethod
    def generate(cls, random_bytes: Callable[[int], bytes], owner: bytes = b"", generation: int = 0) -> "ClusterKey":
        """Generate a new key. `owner`: as the field."""
        return cls(random_bytes(KEY_BYTES), owner, generation)

    @classmethod
    def from_code(cls, code: str) -> "ClusterKey":
        """Read a join code as a person typed it: case, dashes and spaces don't matter; O is read as 0, I and L as 1.

        Raises: ConfigError if the code is mistyped, or has the form that names no owner.
        """
        letters = "".join(code.split()).replace("-", "").upper().removeprefix(_PREFIX.upper())
        if wrong := sorted(set(letters) - set(_CROCKFORD + "OIL")):
            raise _mistyped(f"{wrong[0]!r} does not occur in join codes")
        if is_old_code(letters):
            raise ConfigError(
                "the join code is of an earlier version of meshd, which had no owner key",
                hint="found the cluster anew: `meshd key new --replace` on one device prints a code for the others",
            )
        if len(letters) != _CODE_LETTERS:
            raise _mistyped(f"it has {len(letters)} letters and digits after `{_PREFIX}`, not {_CODE_LETTERS}")
        data = base64.b32decode(letters.translate(_DECODE))
        if _check(data[: _CODE.size]) != data[_CODE.size :]:
            raise _mistyped("its check does not match")
        form, generation, secret, owner = _CODE.unpack_from(data)
        if form != _FORM:
            raise ConfigError(
                f"the join code has form {form}, which this version of meshd does not know", hint="upgrade meshd here"
            )
        return cls(secret, owner, generation)

    def device_key(self, name: str, serial: bytes) -> bytes:
        """Derive the key of a device that sends jobs over MQTT: 32 bytes, from which the cluster key can't be computed."""
        info = _DEVICE_INFO + name.encode() + b"\n" + serial
        return HKDF(algorithm=hashes.SHA256(), length=32, salt=_SALT, info=info).derive(self.secret)

    @property
    def code(self) -> str:
        """The join code: the key as text that a person can type on another device."""
        data = _CODE.pack(_FORM, self.generation, self.secret, self.owner)
        letters = base64.b32encode(data + _check(data)).decode().translate(_ENCODE)
        groups = [letters[at : at + _GROUP] for at in range(0, len(letters), _GROUP)]
        return "-".join([_PREFIX, *groups])

    @cached_property
    def issuer(self) -> Authority:
        """The authority that certifies members.

        Its seed is HKDF-SHA256 of the cluster key, bound to owner and generation: a code in which either was changed joins nothing.
        """
        info = _AUTHORITY_INFO + self.owner + self.generation.to_bytes(2, "big")
        return Authority(_derive(self.secret, info), _name(_AUTHORITY_NAME, f"{self.fingerprint}.{self.generation}"))

    @cached_property
    def return_issuer(self) -> Authority:
        """The authority of returning peers, which every past and present member can derive."""
        return Authority(_derive(self.owner, _RETURN_INFO), _name(_RETURN_NAME, self.fingerprint))

    @property
    def authority(self) -> Ed25519PrivateKey:
        """The Ed25519 key of `issuer`."""
        return self.issuer.private

    @cached_property
    def fingerprint(self) -> str:
        """The cluster's public name: 16 letters and digits, from the founding owner's hash. A rotation does not change it."""
        return cluster_fingerprint(self.owner)

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate of `issuer`."""
        return self.issuer.certificate

    def certify(self, public: Ed25519PublicKey) -> x509.Certificate:
        """Sign a member's certificate. See `Authority.certify`."""
        return self.issuer.certify(public)


def peer_id(public: Ed25519PublicKey) -> PeerId:
    """Return the peer id of a public key: the lower-case base32 of SHA-256 of the public key's 32 raw bytes."""
    return PeerId(_base32(hashlib.sha256(_raw(public)).digest()))


def is_old_code(code: str) -> bool:
    """Whether a text is a valid join code of the first form, which names no owner."""
    letters = "".join(code.split()).replace("-", "").upper().removeprefix(_PREFIX.upper())
    if len(letters) != _OLD_LETTERS or set(letters) - set(_CROCKFORD + "OIL"):
        return False
    data = base64.b32decode(letters.translate(_DECODE))
    return _check(data[:KEY_BYTES])[:_OLD_CHECK_BYTES] == data[KEY_BYTES:]


def _certificate(public: Ed25519PublicKey, subject: x509.Name, serial: int) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
    )


def _name(*parts: str) -> x509.Name:
    oids = (NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME)
    return x509.Name([x509.NameAttribute(oid, part) for oid, part in zip(oids, parts, strict=False)])


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _check(data: bytes) -> bytes:
    return hashlib.sha256(b"meshd join code" + data).digest()[:_CHECK_BYTES]


def _derive(secret: bytes, info: bytes) -> Ed25519PrivateKey:
    seed = HKDF(algorithm=hashes.SHA256(), length=32, salt=_SALT, info=info).derive(secret)
    return Ed25519PrivateKey.from_private_bytes(seed)


def _mistyped(reason: str) -> ConfigError:
    return ConfigError(
        f"the join code is mistyped: {reason}", hint="copy it again from `meshd key show` on a device of the cluster"
    )


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _raw(public: Ed25519PublicKey) -> bytes:
    return public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
