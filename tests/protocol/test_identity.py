"""The cluster key, its join code, the authority derived from it, and the identities that the authority certifies."""

import hashlib
import json
import shutil
import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import ConfigError, MeshdError, PeerRefused, StorageError
from meshd.protocol.identity import (
    CLUSTER_FILE,
    IDENTITY_FILE,
    ClusterKey,
    load_cluster_key,
    load_identity,
    peer_id,
    peer_of_certificate,
    store_cluster_key,
)
from meshd.state import StateFolder

VECTOR = json.loads((Path(__file__).parent / "golden" / "identity.json").read_text())
KEY = ClusterKey(bytes.fromhex(VECTOR["cluster_key"]))
secrets = st.binary(min_size=32, max_size=32)
LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder.open(tmp_path / "state")


def test_the_derivation_matches_the_test_vector() -> None:
    private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(VECTOR["peer_seed"]))
    assert KEY.code == VECTOR["join_code"]
    assert KEY.fingerprint == VECTOR["fingerprint"]
    assert KEY.authority.private_bytes_raw().hex() == VECTOR["authority_seed"]
    assert KEY.authority.public_key().public_bytes_raw().hex() == VECTOR["authority_public"]
    assert der(KEY.certificate).hex() == VECTOR["authority_certificate"]
    assert peer_id(private.public_key()) == VECTOR["peer_id"]
    assert der(KEY.certify(private.public_key())).hex() == VECTOR["peer_certificate"]


@given(secret=secrets)
def test_a_join_code_is_read_however_it_is_typed(secret: bytes) -> None:
    code = ClusterKey(secret).code
    sloppy = code.lower().replace("-", " ").replace("0", "o").replace("1", "l")
    for typed in (code, sloppy, code.replace("-", ""), f"  {code.upper()}\n", code.removeprefix("mesh-")):
        assert ClusterKey.from_code(typed).secret == secret


@given(secret=secrets, at=st.integers(0, 55), letter=st.sampled_from(LETTERS))
def test_a_wrong_letter_is_detected(secret: bytes, at: int, letter: str) -> None:
    letters = list(ClusterKey(secret).code.removeprefix("mesh-").replace("-", ""))
    if letters[at] == letter:
        return
    letters[at] = letter
    with pytest.raises(ConfigError, match="check does not match"):
        ClusterKey.from_code("".join(letters))


@given(secret=secrets, at=st.integers(0, 54))
def test_swapped_letters_are_detected(secret: bytes, at: int) -> None:
    letters = list(ClusterKey(secret).code.removeprefix("mesh-").replace("-", ""))
    if letters[at] == letters[at + 1]:
        return
    letters[at], letters[at + 1] = letters[at + 1], letters[at]
    with pytest.raises(ConfigError):
        ClusterKey.from_code("".join(letters))


@pytest.mark.parametrize("code", ["", "mesh-", "hello", "mesh-" + "0" * 55, "mesh-" + "0" * 57, "mesh-" + "U" + "0" * 55, "é" * 56])
def test_a_malformed_join_code_is_refused(code: str) -> None:
    with pytest.raises(ConfigError, match="join code"):
        ClusterKey.from_code(code)


@given(text=st.text(max_size=80))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        ClusterKey.from_code(text)


def test_the_repr_of_a_key_does_not_contain_it() -> None:
    assert KEY.secret.hex() not in repr(KEY)
    assert KEY.code not in repr(KEY)


def test_different_keys_have_different_authorities() -> None:
    assert ClusterKey(b"x" * 32).fingerprint != KEY.fingerprint
    assert der(ClusterKey(KEY.secret).certificate) == der(KEY.certificate)


def test_certificates_are_valid_on_any_date_and_a_peer_can_not_certify() -> None:
    peer = KEY.certify(Ed25519PrivateKey.generate().public_key())
    for certificate in (KEY.certificate, peer):
        assert certificate.not_valid_before_utc == datetime(1970, 1, 1, tzinfo=UTC)
        assert certificate.not_valid_after_utc.year == 9999
    peer.verify_directly_issued_by(KEY.certificate)
    assert peer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_the_identity_is_stored_and_can_change_its_cluster(folder: StateFolder) -> None:
    seeds = iter([b"1" * 32, b"2" * 32])
    first = load_identity(folder, KEY, lambda count: next(seeds))
    again = load_identity(folder, KEY, lambda count: next(seeds))
    other_cluster = load_identity(folder, ClusterKey(b"x" * 32), lambda count: next(seeds))
    assert first.peer == again.peer == other_cluster.peer
    assert (first.fingerprint, other_cluster.fingerprint) == (KEY.fingerprint, ClusterKey(b"x" * 32).fingerprint)
    assert first.notice == again.notice == ""


def test_a_copied_folder_gets_a_new_identity_and_a_notice(folder: StateFolder, tmp_path: Path) -> None:
    store_cluster_key(folder, KEY)
    original = load_identity(folder, KEY, lambda count: b"1" * count)
    copied = StateFolder.open(Path(shutil.copytree(folder.path, tmp_path / "copy")))
    copy = load_identity(copied, KEY, lambda count: b"2" * count)
    assert copy.peer != original.peer
    assert "copy of another peer's folder" in copy.notice
    assert load_cluster_key(copied) == KEY
    assert load_identity(copied, KEY, lambda count: b"3" * count).notice == ""
    assert load_identity(folder, KEY, lambda count: b"3" * count).peer == original.peer


def test_a_folder_on_another_machine_is_a_copy_too(tmp_path: Path) -> None:
    machine = tmp_path / "machine-id"
    machine.write_text("one\n")
    original = load_identity(StateFolder.open(tmp_path / "state", (machine,)), KEY, lambda count: b"1" * count)
    machine.write_text("two\n")
    moved = load_identity(StateFolder.open(tmp_path / "state", (machine,)), KEY, lambda count: b"2" * count)
    assert moved.peer != original.peer


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", b"\xff\xfe\n\x00"]
)
def test_broken_files_are_reported_with_a_hint(folder: StateFolder, content: bytes) -> None:
    folder.write(IDENTITY_FILE, content)
    folder.write(CLUSTER_FILE, content)
    for load in (lambda: load_identity(folder, KEY, bytes), lambda: load_cluster_key(folder)):
        with pytest.raises(StorageError, match="broken") as raised:
            load()
        assert raised.value.hint


def test_a_key_that_other_users_can_read_is_refused(folder: StateFolder) -> None:
    store_cluster_key(folder, KEY)
    load_identity(folder, KEY, lambda count: b"1" * count)
    for path in folder.path.iterdir():
        path.chmod(0o640)
    for load in (lambda: load_identity(folder, KEY, bytes), lambda: load_cluster_key(folder)):
        with pytest.raises(StorageError, match="0640") as raised:
            load()
        assert "chmod 600" in raised.value.hint


def test_a_folder_without_a_key_has_none(folder: StateFolder) -> None:
    assert load_cluster_key(folder) is None


def test_bytes_that_are_not_a_certificate_are_refused() -> None:
    with pytest.raises(PeerRefused):
        peer_of_certificate(b"junk")


def test_only_tls_1_3_with_this_clusters_certificates(folder: StateFolder) -> None:
    identity = load_identity(folder, KEY, lambda count: b"1" * count)
    for context in (identity.server, identity.client):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert [hashlib.sha256(ca).digest() for ca in context.get_ca_certs(binary_form=True)] == [
            hashlib.sha256(der(KEY.certificate)).digest()
        ]


def test_a_key_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        ClusterKey(b"short")
    assert not issubclass(ValueError, MeshdError)
