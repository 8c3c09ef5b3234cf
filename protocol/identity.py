"""A peer's identity and trust: the cluster key, the certificate authority derived from it, and the TLS contexts of a link.

Every holder of the cluster key derives the same authority, byte for byte; each peer signs its own certificate with the authority's
key. Both certificates are valid from 1970 to 9999, so that a device whose clock is wrong can join. SPEC.md, section 2, specifies
both, with a test vector.
"""

import base64
import datetime
import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshd.errors import ConfigError, PeerRefused, StorageError
from meshd.state import StateFolder
from meshd.types import PeerId

CLUSTER_FILE = "cluster.key"
IDENTITY_FILE = "identity.key"
CERTIFICATE_FILE = "identity.crt"
KEY_BYTES = 32
_CHECK_BYTES = 3
_CODE_LETTERS = 56
_PREFIX = "mesh"
_GROUP = 4
_RFC4648 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ENCODE = str.maketrans(_RFC4648, _CROCKFORD)
_DECODE = str.maketrans(_CROCKFORD + "OIL", _RFC4648 + "ABB")
_SALT = b"meshd"
_AUTHORITY_INFO = b"meshd/1 certificate authority"
_AUTHORITY_NAME = "meshd cluster"
_NOT_BEFORE = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
_BOTH_ENDS = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
_PLACE = "meshd identity of "


@dataclass(frozen=True)
class ClusterKey:
    """The secret that all peers of a cluster share: 32 random bytes."""

    secret: bytes

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a cluster key has {KEY_BYTES} bytes, not {len(self.secret)}")

    def __repr__(self) -> str:
        return f"ClusterKey(of {self.fingerprint})"

    @classmethod
    def generate(cls, random_bytes: Callable[[int], bytes]) -> "ClusterKey":
        """Generate the key of a new cluster."""
        return cls(random_bytes(KEY_BYTES))

    @classmethod
    def from_code(cls, code: str) -> "ClusterKey":
        """Read a join code as a person typed it: case, dashes and spaces don't matter; O is read as 0, I and L as 1.

        Raises: ConfigError if the code is mistyped.
        """
        letters = "".join(code.split()).replace("-", "").upper().removeprefix(_PREFIX.upper())
        if len(letters) != _CODE_LETTERS:
            raise _mistyped(f"it has {len(letters)} letters and digits after `{_PREFIX}`, not {_CODE_LETTERS}")
        if wrong := sorted(set(letters) - set(_CROCKFORD + "OIL")):
            raise _mistyped(f"{wrong[0]!r} does not occur in join codes")
        data = base64.b32decode(letters.translate(_DECODE))
        if _check(data[:KEY_BYTES]) != data[KEY_BYTES:]:
            raise _mistyped("its check does not match")
        return cls(data[:KEY_BYTES])

    @property
    def code(self) -> str:
        """The join code: the key as text that a person can type on another device."""
        letters = base64.b32encode(self.secret + _check(self.secret)).decode().translate(_ENCODE)
        groups = [letters[at : at + _GROUP] for at in range(0, len(letters), _GROUP)]
        return "-".join([_PREFIX, *groups])

    @cached_property
    def authority(self) -> Ed25519PrivateKey:
        """The authority's Ed25519 key. Its seed is HKDF-SHA256 of the cluster key."""
        seed = HKDF(algorithm=hashes.SHA256(), length=32, salt=_SALT, info=_AUTHORITY_INFO).derive(self.secret)
        return Ed25519PrivateKey.from_private_bytes(seed)

    @cached_property
    def fingerprint(self) -> str:
        """The cluster's public name: 16 letters and digits, derived from the authority's public key."""
        return _base32(hashlib.sha256(_raw(self.authority.public_key())).digest()[:10])

    @cached_property
    def certificate(self) -> x509.Certificate:
        """The authority's own certificate. It is the same on every peer."""
        public = self.authority.public_key()
        return (
            _certificate(public, _name(_AUTHORITY_NAME, self.fingerprint), serial=1)
            .issuer_name(_name(_AUTHORITY_NAME, self.fingerprint))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.authority, None)
        )

    def certify(self, public: Ed25519PublicKey) -> x509.Certificate:
        """Sign the certificate of a peer. The same key gives the same certificate."""
        digest = hashlib.sha256(_raw(public)).digest()
        return (
            _certificate(public, _name(peer_id(public)), serial=int.from_bytes(digest[:16], "big") >> 1 | 1)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(_BOTH_ENDS, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority.public_key()), critical=False)
            .sign(self.authority, None)
        )


@dataclass(frozen=True)
class Identity:
    """This peer's id and cluster, and the TLS contexts that prove both to other peers."""

    peer: PeerId
    fingerprint: str
    """Fingerprint of the cluster."""
    server: ssl.SSLContext
    """For accepted connections."""
    client: ssl.SSLContext
    """For dialled connections."""
    notice: str = ""
    """A message for the user if the folder was a copy, so that a new identity was made; otherwise empty."""


def peer_id(public: Ed25519PublicKey) -> PeerId:
    """Return the peer id of a public key: the lower-case base32 of SHA-256 of the public key's 32 raw bytes."""
    return PeerId(_base32(hashlib.sha256(_raw(public)).digest()))


def peer_of_certificate(der: bytes) -> PeerId:
    """Return the id of a certificate's peer. Raises: PeerRefused if the certificate can't be read, or its key is not Ed25519."""
    try:
        public = x509.load_der_x509_certificate(der).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PeerRefused(f"its certificate can't be read: {error}") from error
    if not isinstance(public, Ed25519PublicKey):
        raise PeerRefused("its certificate is not for an Ed25519 key")
    return peer_id(public)


def load_cluster_key(folder: StateFolder) -> ClusterKey | None:
    """Load the cluster key from the folder.

    Returns: None if the folder has no key yet.
    Raises: StorageError if the file is broken, or other users may read it.
    """
    data = folder.read(CLUSTER_FILE)
    if data is None:
        return None
    try:
        return ClusterKey.from_code(data.decode("ascii"))
    except (UnicodeDecodeError, ConfigError) as error:
        raise StorageError(
            f"{folder.path / CLUSTER_FILE} is broken: it holds no join code", hint="remove it, then `meshd key join CODE`"
        ) from error


def stored_code(folder: StateFolder) -> str:
    """Return the join code of the key in the folder. Raises: StorageError if there is none."""
    key = load_cluster_key(folder)
    if key is None:
        raise StorageError(f"there is no cluster key in {folder.path} any more", hint="restart the daemon: `meshd up`")
    return key.code


def store_cluster_key(folder: StateFolder, key: ClusterKey) -> None:
    """Store the cluster key as its join code. Raises: StorageError."""
    folder.write(CLUSTER_FILE, f"{key.code}\n".encode())


def choose_cluster_key(folder: StateFolder, code: str | None, random_bytes: Callable[[int], bytes]) -> tuple[ClusterKey, bool]:
    """Choose the cluster's key: the stored one, else the one of the join code, else a new one. Store it in the folder.

    Returns: the key, and whether it is new.
    Raises: ConfigError if the code is mistyped or of another cluster than the folder; StorageError.
    """
    stored = load_cluster_key(folder)
    given = ClusterKey.from_code(code) if code else None
    if stored is not None and given is not None and given != stored:
        raise ConfigError(
            f"{folder.path} belongs to cluster {stored.fingerprint}, but the join code is of cluster {given.fingerprint}",
            hint="move this device with `meshd key join CODE --replace`, then `meshd up`; or use another folder with --state DIR",
        )
    key = stored or given or ClusterKey.generate(random_bytes)
    if stored is None:
        store_cluster_key(folder, key)
    return key, stored is None and given is None


def load_identity(folder: StateFolder, cluster: ClusterKey, random_bytes: Callable[[int], bytes]) -> Identity:
    """Load the folder's identity and certify it in the cluster. At the first start and in a copied folder, make a new one.

    Raises: StorageError if the key file is broken, or other users may read it.
    """
    private, notice = _load_private(folder)
    if private is None:
        private = Ed25519PrivateKey.from_private_bytes(random_bytes(32))
        folder.write(IDENTITY_FILE, f"{_PLACE}{folder.location_id()}\n".encode() + _pem(private))
    pem = cluster.certify(private.public_key()).public_bytes(serialization.Encoding.PEM)
    if folder.read(CERTIFICATE_FILE) != pem:
        folder.write(CERTIFICATE_FILE, pem)
    return Identity(
        peer=peer_id(private.public_key()),
        fingerprint=cluster.fingerprint,
        server=_context(ssl.PROTOCOL_TLS_SERVER, cluster, folder.path),
        client=_context(ssl.PROTOCOL_TLS_CLIENT, cluster, folder.path),
        notice=notice,
    )


def _load_private(folder: StateFolder) -> tuple[Ed25519PrivateKey | None, str]:
    if folder.read(IDENTITY_FILE) is None:
        return None, ""
    if is_copy(folder):
        return None, f"{folder.path} is a copy of another peer's folder, so this peer has made a new identity"
    return load_private_key(folder), ""


def is_copy(folder: StateFolder) -> bool:
    """Whether the folder's identity was made in another folder or on another device. Raises: StorageError."""
    first, _, _ = (folder.read(IDENTITY_FILE) or b"").partition(b"\n")
    return first.startswith(_PLACE.encode()) and first != f"{_PLACE}{folder.location_id()}".encode()


def load_private_key(folder: StateFolder) -> Ed25519PrivateKey:
    """Load this peer's own key, also from a copied folder. Raises: StorageError if there is none or the file is broken."""
    _, _, pem = (folder.read(IDENTITY_FILE) or b"").partition(b"\n")
    try:
        private = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _broken(folder) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _broken(folder)
    return private


def _broken(folder: StateFolder) -> StorageError:
    path = folder.path / IDENTITY_FILE
    return StorageError(f"{path} is broken: it holds no Ed25519 key", hint="remove it: the next start makes a new one")


def _context(protocol: int, cluster: ClusterKey, folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=cluster.certificate.public_bytes(serialization.Encoding.DER))
    context.load_cert_chain(folder / CERTIFICATE_FILE, folder / IDENTITY_FILE)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    return context


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


def _check(secret: bytes) -> bytes:
    return hashlib.sha256(b"meshd join code" + secret).digest()[:_CHECK_BYTES]


def _mistyped(reason: str) -> ConfigError:
    return ConfigError(
        f"the join code is mistyped: {reason}", hint="copy it again from `meshd key show` on a device of the cluster"
    )


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _raw(public: Ed25519PublicKey) -> bytes:
    return public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def _pem(private: Ed25519PrivateKey) -> bytes:
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
