"""Decoding of the spellings that vocabularies use for bytes."""

import pytest
from tokenizers import pre_tokenizers

from meshd.models.text.tokenizer.spelling import byte_level, sentencepiece


def test_every_byte_has_one_character_of_the_librarys_alphabet() -> None:
    letters = pre_tokenizers.ByteLevel.alphabet()
    assert sorted(byte_level(letter) for letter in letters) == [bytes((byte,)) for byte in range(256)]


@pytest.mark.parametrize("text", ["a b", "é\n\t", "你好", "\x00\x7f\u00ad", "👧🏽"])
def test_byte_level_inverts_the_librarys_spelling(text: str) -> None:
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert byte_level("".join(word for word, _ in spelt)) == text.encode()


def test_a_character_outside_the_alphabet_becomes_utf8() -> None:
    assert byte_level("你a") == "你a".encode()
    assert byte_level("\ud800") == b"?"


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("▁▁the", b"  the"),
        ("<0xE4>", b"\xe4"),
        ("<0xe4>", b"\xe4"),
        ("<0x00>", b"\0"),
        ("<0xE4", b"<0xE4"),
        ("<0xE44>", b"<0xE44>"),
        ("a<0xE4>", b"a<0xE4>"),
        ("<0xGG>", b"<0xGG>"),
        ("", b""),
    ],
)
def test_sentencepiece_spells_spaces_with_a_mark_and_single_bytes_in_hex(token: str, expected: bytes) -> None:
    assert sentencepiece(token) == expected
