"""A peer's identity: its own key and the cluster's, with their files in the state folder, and the TLS contexts of a link."""

import base64
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from meshd.errors import ConfigError, PeerRefused, ProtocolViolation, StorageError
from meshd.protocol.cluster_key import KEY_BYTES, Authority, is_old_code
from meshd.protocol.cluster_key import ClusterKey as ClusterKey
from meshd.protocol.cluster_key import peer_id as peer_id
from meshd.protocol.owner import OwnerKey, store_owner_key
from meshd.protocol.trust import RotationChain
from meshd.state import StateFolder
from meshd.types import PeerId

CLUSTER_FILE = "cluster.key"
IDENTITY_FILE = "identity.key"
CERTIFICATE_FILE = "identity.crt"
RETURN_FILE = "return.crt"
RETURN_SERVER = "return.meshd"
"""Server name (SNI) with which a dialler asks for a connection under the authority of returning peers."""
_PLACE = "meshd identity of "


@dataclass(frozen=True)
class Identity:
    """This peer's id and cluster key, and the TLS contexts that prove both to other peers."""

    peer: PeerId
    key: ClusterKey
    server: ssl.SSLContext
    """For accepted connections. Trusts the present authority, or, if the dialler names `RETURN_SERVER`, that of returning peers."""
    client: ssl.SSLContext
    """For dialled connections."""
    return_client: ssl.SSLContext
    """For dialled connections with peers that have another cluster key, under the authority of returning peers."""
    private: Ed25519PrivateKey = field(repr=False)
    """This peer's own key. `statement.py` signs with it what no link carries."""
    certificate: bytes
    """Of this peer's key, in DER."""
    notice: str = ""
    """A message for the user if the folder was a copy, so that a new identity was made; otherwise empty."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the cluster."""
        return self.key.fingerprint


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
    """Load the cluster key from the folder. Returns, Raises: as `load_trust`."""
    trust = load_trust(folder)
    return trust[0] if trust is not None else None


def load_trust(folder: StateFolder) -> tuple[ClusterKey, RotationChain] | None:
    """Load the cluster key, and the rotations that led to it, from the folder.

    Returns: None if the folder has no key yet.
    Raises: StorageError if the file is broken or of an earlier version, or other users may read it.
    """
    data = folder.read(CLUSTER_FILE)
    if data is None:
        return None
    path = folder.path / CLUSTER_FILE
    try:
        code, _, chain = data.decode("ascii").strip().partition("\n")
        if is_old_code(code):
            raise StorageError(
                f"{path} is of an earlier version of meshd, which had no owner key",
                hint="`meshd key new --replace` on one device of the cluster, then `meshd key join CODE --replace` on the others",
            )
        key = ClusterKey.from_code(code)
        return key, RotationChain.decode(key.owner, base64.b64decode(chain))
    except (ValueError, ConfigError, ProtocolViolation) as error:
        raise StorageError(f"{path} is broken: it holds no join code", hint="remove it, then `meshd key join CODE`") from error


def stored_code(folder: StateFolder) -> str:
    """Return the join code of the key in the folder. Raises: StorageError if there is none."""
    key = load_cluster_key(folder)
    if key is None:
        raise StorageError(f"there is no cluster key in {folder.path} any more", hint="restart the daemon: `meshd up`")
    return key.code


def store_cluster_key(folder: StateFolder, key: ClusterKey, chain: RotationChain | None = None) -> None:
    """Store the cluster key as its join code, and the rotations that led to it, in one step. Raises: StorageError."""
    lines = [key.code, base64.b64encode(chain.encode()).decode() if chain is not None else ""]
    folder.write(CLUSTER_FILE, ("\n".join(lines).strip() + "\n").encode())


def found_cluster(folder: StateFolder, random_bytes: Callable[[int], bytes]) -> ClusterKey:
    """Make the keys of a new cluster, and store the owner's in the folder. The cluster key is returned. Raises: StorageError."""
    owner = OwnerKey.from_seed(random_bytes(KEY_BYTES))
    store_owner_key(folder, owner.hash, owner)
    return ClusterKey.generate(random_bytes, owner.hash)


def choose_cluster_key(folder: StateFolder, code: str | None, random_bytes: Callable[[int], bytes]) -> tuple[ClusterKey, bool]:
    """Choose the cluster's key: the stored one, else the one of the join code, else a new one. Store it in the folder.

    Of two keys of one cluster, the later one is chosen: a start script may still have the code from before a rotation.

    Returns: the key, and whether it is new.
    Raises: ConfigError if the code is mistyped or of another cluster than the folder; StorageError.
    """
    stored = load_cluster_key(folder)
    given = ClusterKey.from_code(code) if code else None
    if stored is not None and (given is None or given == stored or _replaces(stored, given)):
        return stored, False
    if stored is not None and given is not None and not _replaces(given, stored):
        raise ConfigError(
            f"{folder.path} belongs to cluster {stored.fingerprint}, but the join code is of "
            + ("another key of it" if given.owner == stored.owner else f"cluster {given.fingerprint}"),
            hint="move this device with `meshd key join CODE --replace`, then `meshd up`; or use another folder with --state DIR",
        )
    key = given or found_cluster(folder, random_bytes)
    store_cluster_key(folder, key)
    return key, given is None


def _replaces(key: ClusterKey, other: ClusterKey) -> bool:
    """Whether a key is a later one of the same cluster."""
    return key.owner == other.owner and key.generation > other.generation


def load_identity(folder: StateFolder, cluster: ClusterKey, random_bytes: Callable[[int], bytes]) -> Identity:
    """Load the folder's identity and certify it in the cluster. At the first start and in a copied folder, make a new one.

    Raises: StorageError if the key file is broken, or other users may read it.
    """
    private, notice = _load_private(folder)
    if private is None:
        private = Ed25519PrivateKey.from_private_bytes(random_bytes(32))
        folder.write(IDENTITY_FILE, f"{_PLACE}{folder.location_id()}\n".encode() + _pem(private))
    for issuer, name in ((cluster.issuer, CERTIFICATE_FILE), (cluster.return_issuer, RETURN_FILE)):
        pem = issuer.certify(private.public_key()).public_bytes(serialization.Encoding.PEM)
        if folder.read(name) != pem:
            folder.write(name, pem)
    server = _context(ssl.PROTOCOL_TLS_SERVER, cluster.issuer, folder.path, CERTIFICATE_FILE)
    return_server = _context(ssl.PROTOCOL_TLS_SERVER, cluster.return_issuer, folder.path, RETURN_FILE)

    def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name == RETURN_SERVER:
            connection.context = return_server

    server.sni_callback = choose
    return Identity(
        peer=peer_id(private.public_key()),
        key=cluster,
        server=server,
        client=_context(ssl.PROTOCOL_TLS_CLIENT, cluster.issuer, folder.path, CERTIFICATE_FILE),
        return_client=_context(ssl.PROTOCOL_TLS_CLIENT, cluster.return_issuer, folder.path, RETURN_FILE),
        private=private,
        certificate=cluster.issuer.certify(private.public_key()).public_bytes(serialization.Encoding.DER),
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


def _context(protocol: int, trusted: Authority, folder: Path, certificate: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=trusted.certificate.public_bytes(serialization.Encoding.DER))
    context.load_cert_chain(folder / certificate, folder / IDENTITY_FILE)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    return context


def _pem(private: Ed25519PrivateKey) -> bytes:
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
