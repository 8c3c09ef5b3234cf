"""How vocabularies spell bytes in their tokens."""

import re

WORD_START = "\u2581"
"""The character that SentencePiece writes for a space."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of() -> dict[str, int]:
    """Make GPT-2's alphabet, character -> byte. Printable bytes are spelt as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_of()
_NOT_LATIN = "\u0100"
_TO_LATIN = dict.fromkeys(range(256), _NOT_LATIN) | {ord(character): chr(byte) for character, byte in _BYTE_OF.items()}
"""Translates the alphabet to the characters with the same number as the bytes; other characters to ones that Latin-1 lacks."""


def byte_level(token: str) -> bytes:
    """Decode a token in GPT-2's spelling, one character per byte. Characters outside the alphabet become their UTF-8 bytes."""
    try:
        return token.translate(_TO_LATIN).encode("latin-1")
    except UnicodeEncodeError:
        return b"".join(_bytes_of(character) for character in token)


def sentencepiece(token: str) -> bytes:
    """Decode a token in SentencePiece's spelling: U+2581 for a space, and `<0xE4>` for a single byte."""
    byte = _BYTE_PIECE.fullmatch(token)
    return bytes((int(byte[1], 16),)) if byte else token.replace(WORD_START, " ").encode("utf-8", errors="replace")


def _bytes_of(character: str) -> bytes:
    byte = _BYTE_OF.get(character)
    return character.encode("utf-8", errors="replace") if byte is None else bytes((byte,))
