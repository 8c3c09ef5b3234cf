"""Invite codes."""

import math
import os

import pytest

from meshd.errors import ConfigError
from meshd.protocol.pairing.code import MOST_NUMBER, SECRET_BITS, InviteCode
from meshd.protocol.pairing.words import WORDS


def test_the_words_have_the_bits_that_the_documents_promise() -> None:
    assert 2 * math.log2(len(set(WORDS))) == SECRET_BITS
    assert len({word[:4] for word in WORDS}) == len(WORDS)
    assert list(WORDS) == sorted(WORDS)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)
    assert {"amber", "lion"} <= set(WORDS)


def test_every_code_can_be_typed_again() -> None:
    for _ in range(200):
        code = InviteCode.generate(os.urandom)
        assert 1 <= code.number <= MOST_NUMBER
        assert InviteCode.parse(str(code)) == code
        assert str(code.words[1]) not in repr(code)


def test_every_word_can_come() -> None:
    words = {InviteCode.generate(lambda count, at=at: at.to_bytes(count, "big")).words[0] for at in range(len(WORDS))}
    assert words == set(WORDS)


@pytest.mark.parametrize(
    "typed", ["7-amber-lion", " 7 Amber LION ", "7-ambe-lion", "07-amber--lion", "7_amber.lion", "7 -amber- lion", "7-amber-lion\n"]
)
def test_how_a_code_may_be_typed(typed: str) -> None:
    assert InviteCode.parse(typed) == InviteCode(7, ("amber", "lion"))


@pytest.mark.parametrize(
    "typed",
    ["", "7", "7-amber", "7-amber-lion-lion", "amber-lion-7", "0-amber-lion", "100-amber-lion", "7-am-lion", "7-amber-lions",
     "7-ambr-lion",      "\u0667-amber-lion", "9" * 99 + "-amber-lion", "0000000799-amber-lion",
     "0" * 5000 + "7-amber-lion", "7-" + "a" * 9999 + "-lion"],
)  # fmt: skip
def test_other_texts_are_mistyped(typed: str) -> None:
    with pytest.raises(ConfigError, match="mistyped") as caught:
        InviteCode.parse(typed)
    assert len(str(caught.value)) < 300


def test_a_mistyped_word_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean amber"):
        InviteCode.parse("7-ambr-lion")
