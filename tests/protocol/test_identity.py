"""The cluster key, its join code, the authority derived from it, and the identities that the authority certifies."""

import base64
import hashlib
import json
import os
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
    choose_cluster_key,
    load_cluster_key,
    load_identity,
    load_trust,
    peer_id,
    peer_of_certificate,
    store_cluster_key,
)
from meshd.protocol.owner import load_owner_key
from meshd.protocol.trust import RotationChain
from meshd.state import StateFolder

VECTOR = json.loads((Path(__file__).parent / "golden" / "identity.json").read_text())
KEY = ClusterKey(bytes.fromhex(VECTOR["cluster_key"]), bytes.fromhex(VECTOR["owner_hash"]), int(VECTOR["generation"]))
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
    assert KEY.return_issuer.private.private_bytes_raw().hex() == VECTOR["return_seed"]
    assert der(KEY.certificate).hex() == VECTOR["authority_certificate"]
    assert peer_id(private.public_key()) == VECTOR["peer_id"]
    assert der(KEY.certify(private.public_key())).hex() == VECTOR["peer_certificate"]


@given(secret=secrets, owner=st.binary(min_size=16, max_size=16), generation=st.integers(0, 0xFFFF))
def test_a_join_code_is_read_however_it_is_typed(secret: bytes, owner: bytes, generation: int) -> None:
    key = ClusterKey(secret, owner, generation)
    code = key.code
    sloppy = code.lower().replace("-", " ").replace("0", "o").replace("1", "l")
    for typed in (code, sloppy, code.replace("-", ""), f"  {code.upper()}\n", code.removeprefix("mesh-")):
        assert ClusterKey.from_code(typed) == key


@given(secret=secrets, at=st.integers(0, 87), letter=st.sampled_from(LETTERS))
def test_a_wrong_letter_is_detected(secret: bytes, at: int, letter: str) -> None:
    letters = list(ClusterKey(secret).code.removeprefix("mesh-").replace("-", ""))
    if letters[at] == letter:
        return
    letters[at] = letter
    with pytest.raises(ConfigError, match="check does not match"):
        ClusterKey.from_code("".join(letters))


@given(secret=secrets, at=st.integers(0, 86))
def test_swapped_letters_are_detected(secret: bytes, at: int) -> None:
    letters = list(ClusterKey(secret).code.removeprefix("mesh-").replace("-", ""))
    if letters[at] == letters[at + 1]:
        return
    letters[at], letters[at + 1] = letters[at + 1], letters[at]
    with pytest.raises(ConfigError):
        ClusterKey.from_code("".join(letters))


@pytest.mark.parametrize("code", ["", "mesh-", "hello", "mesh-" + "0" * 87, "mesh-" + "0" * 89, "mesh-" + "U" + "0" * 87, "é" * 88])
def test_a_malformed_join_code_is_refused(code: str) -> None:
    with pytest.raises(ConfigError, match="join code"):
        ClusterKey.from_code(code)


OLD_CODE = "mesh-000G-40R4-0M30-E209-185G-R38E-1W81-24GK-2GAH-C5RR-34D1-P70X-3RFX-S64S"
"""A join code of the form that names no owner."""


def test_a_code_without_an_owner_is_refused_and_says_how_to_go_on(folder: StateFolder) -> None:
    with pytest.raises(ConfigError, match="no owner key") as raised:
        ClusterKey.from_code(OLD_CODE)
    assert "meshd key new --replace" in raised.value.hint
    folder.write(CLUSTER_FILE, f"{OLD_CODE}\n".encode())
    with pytest.raises(StorageError, match="earlier version of meshd, which had no owner key") as stored:
        load_cluster_key(folder)
    assert "meshd key join CODE --replace" in stored.value.hint


def test_a_code_of_a_later_form_says_so() -> None:
    data = b"\x03" + bytes(50)
    check = hashlib.sha256(b"meshd join code" + data).digest()[:4]
    rfc = base64.b32encode(data + check).decode()
    code = rfc.translate(str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", LETTERS))
    with pytest.raises(ConfigError, match="does not know"):
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
    assert der(ClusterKey(KEY.secret, KEY.owner, KEY.generation).certificate) == der(KEY.certificate)


def test_the_authority_is_bound_to_owner_and_generation_and_the_name_to_the_owner_only() -> None:
    """Whoever changes the owner's hash in a code that he passes on has made a code that joins nothing."""
    other_owner, later = ClusterKey(KEY.secret, b"o" * 16, KEY.generation), ClusterKey(KEY.secret, KEY.owner, KEY.generation + 1)
    assert len({key.issuer.public for key in (KEY, other_owner, later)}) == 3
    assert KEY.fingerprint == later.fingerprint != other_owner.fingerprint
    assert KEY.return_issuer.public == later.return_issuer.public != other_owner.return_issuer.public


def test_key_and_rotations_are_stored_together(folder: StateFolder) -> None:
    chain = RotationChain.decode(KEY.owner, bytes.fromhex(VECTOR["rotation"]))
    assert chain.hash.hex() == VECTOR["rotation_hash"]
    store_cluster_key(folder, KEY, chain)
    assert load_trust(folder) == (KEY, chain)
    store_cluster_key(folder, KEY)
    assert load_trust(folder) == (KEY, RotationChain(KEY.owner))


def test_a_new_cluster_has_an_owner_key_that_only_this_user_can_read(folder: StateFolder) -> None:
    key, new = choose_cluster_key(folder, None, os.urandom)
    owner = load_owner_key(folder, key.owner, key.owner)
    assert new
    assert owner is not None
    assert owner.hash == key.owner
    (path,) = folder.path.glob("owner-*.key")
    assert path.stat().st_mode & 0o777 == 0o600


def test_of_two_keys_of_one_cluster_the_later_one_is_chosen(folder: StateFolder) -> None:
    earlier, later = ClusterKey(b"a" * 32, KEY.owner, 1), ClusterKey(b"b" * 32, KEY.owner, 2)
    assert choose_cluster_key(folder, earlier.code, os.urandom) == (earlier, False)
    assert choose_cluster_key(folder, later.code, os.urandom) == (later, False)
    assert choose_cluster_key(folder, earlier.code, os.urandom) == (later, False)
    with pytest.raises(ConfigError, match="another key of it"):
        choose_cluster_key(folder, ClusterKey(b"c" * 32, KEY.owner, 2).code, os.urandom)
    with pytest.raises(ConfigError, match="belongs to cluster"):
        choose_cluster_key(folder, ClusterKey(b"c" * 32, b"p" * 16, 3).code, os.urandom)


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
