"""Checks of this peer's identity: the cluster's key, the peer's key and its certificate, and whether the folder was copied."""

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from meshd.doctor.check import Context, Found, ok, unchecked, warning, wrong
from meshd.errors import StorageError
from meshd.protocol.identity import (
    CERTIFICATE_FILE,
    CLUSTER_FILE,
    IDENTITY_FILE,
    ClusterKey,
    is_copy,
    load_cluster_key,
    load_private_key,
    peer_id,
)
from meshd.state import StateFolder


def cluster_key(context: Context) -> Found:
    """Check the file with the cluster's key."""
    folder = context.config.state
    try:
        key = load_cluster_key(StateFolder(folder))
    except StorageError as error:
        mend = error.hint if error.hint.startswith("chmod") else f"rm {folder / CLUSTER_FILE}, then `meshd key join CODE`"
        return [wrong("cluster-key", error.message, mend)]
    if key is None:
        return [ok("cluster-key", "no cluster yet: `meshd up` makes one, `meshd up --key CODE` joins one")]
    if context.peer is not None and key.fingerprint != context.peer.cluster:
        found = f"the daemon is in cluster {context.peer.cluster}, but its folder now has the key of {key.fingerprint}"
        return [warning("cluster-key", found, "start `meshd up` again, so that it joins that cluster")]
    return [ok("cluster-key", f"cluster {key.fingerprint}")]


def identity(context: Context) -> Found:
    """Check this peer's own key, its certificate, and that the folder is not a copy."""
    folder = StateFolder(context.config.state)
    try:
        if folder.read(IDENTITY_FILE) is None:
            return [ok("identity", "no identity yet: the first `meshd up` makes one")]
        private = load_private_key(folder)
        copied = is_copy(folder)
    except StorageError as error:
        mend = error.hint if error.hint.startswith("chmod") else f"rm {folder.path / IDENTITY_FILE}, then `meshd up`"
        return [wrong("identity", error.message, mend)]
    if copied:
        found = f"{folder.path} is a copy of another peer's folder: two devices must not use one identity"
        mend = f"rm {folder.path / IDENTITY_FILE}; `meshd up` then makes an identity of its own for this device"
        return [wrong("copied-folder", found, mend)]
    public = private.public_key()
    return [ok("identity", f"peer {peer_id(public)}"), *_certificate(context, folder, public)]


def _certificate(context: Context, folder: StateFolder, public: Ed25519PublicKey) -> Found:
    """Check that the certificate is for this key, signed by the cluster's authority, and valid now."""
    path = folder.path / CERTIFICATE_FILE
    renew = f"rm {path}, then start `meshd up` again, which makes a new one"
    data = folder.read(CERTIFICATE_FILE)
    if data is None:
        yield ok("certificate", "the next `meshd up` makes it")
        return
    try:
        certificate = x509.load_pem_x509_certificate(data)
    except ValueError:
        yield wrong("certificate", f"{path} is broken: it holds no certificate", renew)
        return
    yield from _problems(context, certificate, public, path, renew)


def _problems(context: Context, certificate: x509.Certificate, public: Ed25519PublicKey, path: Path, renew: str) -> Found:
    raw = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    own = certificate.public_key()
    found = []
    if not isinstance(own, Ed25519PublicKey) or own.public_bytes(*raw) != public.public_bytes(*raw):
        found.append(wrong("certificate", f"{path} is for another key than {IDENTITY_FILE}", renew))
    if (key := _cluster_key(context)) is None:
        found.append(unchecked("certificate", "the cluster's key can't be read, so the signature is not checked"))
    elif not _signed_by(certificate, key):
        found.append(wrong("certificate", f"{path} was not signed by the authority of cluster {key.fingerprint}", renew))
    now = datetime.datetime.fromtimestamp(context.clock.wall(), datetime.UTC)
    if now > certificate.not_valid_after_utc:
        mend = f"{renew}; if this device's clock is wrong ({now:%Y-%m-%d}), `sudo timedatectl set-ntp true`"
        found.append(wrong("certificate", f"{path} has expired on {certificate.not_valid_after_utc:%Y-%m-%d}", mend))
    elif now < certificate.not_valid_before_utc:
        mend = f"sudo timedatectl set-ntp true (this device says that it is {now:%Y-%m-%d}); or {renew}"
        found.append(wrong("certificate", f"{path} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d}", mend))
    yield from found or [ok("certificate", f"valid until {certificate.not_valid_after_utc:%Y-%m-%d}, under the cluster's key")]


def _cluster_key(context: Context) -> ClusterKey | None:
    try:
        return load_cluster_key(StateFolder(context.config.state))
    except StorageError:
        return None


def _signed_by(certificate: x509.Certificate, key: ClusterKey) -> bool:
    try:
        certificate.verify_directly_issued_by(key.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
