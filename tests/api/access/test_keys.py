"""The form of API keys."""

import os

import msgspec
import pytest

from meshd.api.access.keys import ApiKey, digest_of, generate, prefix_of
from meshd.api.access.scopes import Scope

KEY = ApiKey(name="phone", prefix="meshd-abc123", sha256="0" * 64, scope=Scope.INFER, created=1)


def test_a_key_can_be_recognised_and_shows_its_prefix() -> None:
    text, prefix = generate(os.urandom)
    assert text.startswith(f"{prefix}-")
    assert prefix_of(text) == prefix
    assert generate(os.urandom)[0] != text


def test_the_letters_of_a_key_are_its_random_bytes() -> None:
    """Each letter has five bits: 160 bits for the secret."""
    zeros, _ = generate(bytes)
    assert zeros == "meshd-000000-" + 32 * "0"
    ends = {generate(lambda _, last=last: bytes([*bytes(37), last]))[0] for last in range(32)}
    assert len(ends) == 32


@pytest.mark.parametrize("text", ["", "meshd-", "meshd-abc123", "meshd-abc123-" + 31 * "a", "meshd-abcIl1-" + 32 * "a", "\udcff"])
def test_other_texts_have_no_prefix_but_a_hash(text: str) -> None:
    assert prefix_of(text) is None
    assert len(digest_of(text)) == 32


def test_a_key_expires_at_its_time() -> None:
    expiring = msgspec.structs.replace(KEY, expires=100)
    assert not expiring.expired(99.9)
    assert expiring.expired(100.0)
    assert not KEY.expired(1e12)
