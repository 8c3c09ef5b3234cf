"""The owner key: whoever has it decides which devices belong to the cluster. SPEC.md, section 12, specifies its use.

The cluster key is known to every member, so it cannot exclude one of them. The owner key signs rotations (`trust.py`), stays on
the device that founded the cluster, and is copied to another one only by the owner's command.
"""

import base64
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.errors import StorageError
from meshd.state import StateFolder

OWNER_HASH_BYTES = 16
"""128 bits: nobody finds another key with the same hash."""
_NEXT = ".next"


def owner_hash(public: bytes) -> bytes:
    """Return the hash by which join codes name the owner: `OWNER_HASH_BYTES` bytes of the public key's SHA-256."""
    return hashlib.sha256(b"meshd owner" + public).digest()[:OWNER_HASH_BYTES]


def cluster_fingerprint(founder: bytes) -> str:
    """Return the cluster's public name, 16 letters and digits, from the hash of the owner key that founded it."""
    return base64.b32encode(hashlib.sha256(b"meshd cluster" + founder).digest()[:10]).decode().lower()


@dataclass(frozen=True)
class OwnerKey:
    """An owner's Ed25519 key."""

    private: Ed25519PrivateKey

    def __repr__(self) -> str:
        return f"OwnerKey({self.hash.hex()})"

    @classmethod
    def from_seed(cls, seed: bytes) -> "OwnerKey":
        """Make the key of 32 bytes. Raises: ValueError for another number of bytes."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def seed(self) -> bytes:
        return self.private.private_bytes_raw()

    @property
    def public(self) -> bytes:
        """The 32 bytes of the public key."""
        return self.private.public_key().public_bytes_raw()

    @property
    def hash(self) -> bytes:
        """See `owner_hash`."""
        return owner_hash(self.public)


def owner_file(founder: bytes) -> str:
    """Return the name of the owner key's file. Each cluster has its own, so that joining another cluster destroys no owner key."""
    return f"owner-{cluster_fingerprint(founder)}.key"


def load_owner_key(folder: StateFolder, founder: bytes, owner: bytes) -> OwnerKey | None:
    """Load the key with the hash `owner`, of the cluster that the owner `founder` founded.

    Returns: None if this device does not have it.
    Raises: StorageError if the file is broken, or other users may read it.
    """
    name = owner_file(founder)
    keys = [_load(folder, known) for known in (name, name + _NEXT)]
    return next((key for key in keys if key is not None and key.hash == owner), None)


def store_owner_key(folder: StateFolder, founder: bytes, key: OwnerKey, *, next_one: bool = False) -> None:
    """Store the owner key, with mode 0600. Raises: StorageError.

    `next_one`: it is to be the owner by a rotation that is not sent yet. It must be stored before: the cluster would have no owner
    if it were lost.
    """
    pem = key.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    name = owner_file(founder)
    folder.write(name + _NEXT if next_one else name, pem)


def _load(folder: StateFolder, name: str) -> OwnerKey | None:
    data = folder.read(name)
    if data is None:
        return None
    try:
        private = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _broken(folder, name) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _broken(folder, name)
    return OwnerKey(private)


def _broken(folder: StateFolder, name: str) -> StorageError:
    return StorageError(
        f"{folder.path / name} is broken: it holds no Ed25519 key",
        hint="copy it from another owner's device with `meshd key owner add`, or from a backup",
    )
