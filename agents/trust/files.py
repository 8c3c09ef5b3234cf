"""The files of the state folder that hold the cluster's key, the rotations that led to it, and the owner key."""

from typing import Protocol

from meshd.clock import Clock
from meshd.errors import MeshdError, StorageError
from meshd.protocol.cluster_key import ClusterKey
from meshd.protocol.identity import Identity, load_cluster_key, load_identity, store_cluster_key
from meshd.protocol.owner import OwnerKey, store_owner_key
from meshd.protocol.trust import RotationChain
from meshd.state import StateFolder

EXCLUDED_FILE = "excluded"
"""The chain of rotations that shows that this device was excluded, after the public key of the authority that it had then."""
_AUTHORITY_BYTES = 32


class TrustFiles(Protocol):
    """Where a peer keeps what it knows of the cluster's key."""

    def store(self, key: ClusterKey, chain: RotationChain) -> Identity:
        """Store a key and the rotations that led to it, in one step.

        Returns: this peer's identity under the key.
        Raises: StorageError, also if the folder belongs to another cluster by now.
        """
        ...

    def store_exclusion(self, key: ClusterKey, chain: RotationChain) -> None:
        """Store the rotations that exclude this peer as long as it has this key. Raises: StorageError."""
        ...

    def store_owner(self, founder: bytes, key: OwnerKey) -> None:
        """Store a copy of the owner key. Raises: StorageError."""
        ...


class StateFiles:
    """Implements `TrustFiles` in the state folder."""

    def __init__(self, folder: StateFolder, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock

    def store(self, key: ClusterKey, chain: RotationChain) -> Identity:
        """See `TrustFiles.store`."""
        present = load_cluster_key(self._folder)
        if present is not None and present.owner != key.owner:
            raise StorageError(f"{self._folder.path} belongs to another cluster by now", hint="restart `meshd up`")
        store_cluster_key(self._folder, key, chain)
        return load_identity(self._folder, key, self._clock.random_bytes)

    def store_exclusion(self, key: ClusterKey, chain: RotationChain) -> None:
        """See `TrustFiles.store_exclusion`."""
        self._folder.write(EXCLUDED_FILE, key.issuer.public + chain.encode())

    def store_owner(self, founder: bytes, key: OwnerKey) -> None:
        """See `TrustFiles.store_owner`."""
        store_owner_key(self._folder, founder, key)


def load_exclusion(folder: StateFolder, key: ClusterKey) -> RotationChain | None:
    """Load the rotations that exclude this device from its cluster.

    Returns: None if there are none, or the device has joined again since, or another cluster.
    """
    data = folder.read(EXCLUDED_FILE) or b""
    if data[:_AUTHORITY_BYTES] != key.issuer.public:
        return None
    try:
        chain = RotationChain.decode(key.owner, data[_AUTHORITY_BYTES:])
    except MeshdError:
        return None  # a torn file: the next peer that it dials tells it again
    return chain if chain.last is not None else None
