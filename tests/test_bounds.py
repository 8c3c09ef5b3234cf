"""The named types: what they accept, and the texts that are made to fit them."""

import math
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd import bounds
from meshd.bounds import MAX_LAYERS, MAX_TEXT, Address, Fraction, Label, PeerName, Sha256, Text, Tokens, Word, describe, printable

ESCAPES = ("\x00", "\x1b", "\x7f", "\x9b", "\n", "\u2028", "\u202e", "\u2066", "\u200b", "\ufeff")
"""Characters that move a terminal's cursor, change its colours, break a line, turn the direction of writing or are invisible."""


def accepts(kind: Any, value: object) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


@pytest.mark.parametrize("kind", [Text, Label, Word, PeerName, Address, Sha256])
@pytest.mark.parametrize("character", ESCAPES, ids=ascii)
def test_no_text_of_a_peer_has_characters_that_change_a_terminal(kind: Any, character: str) -> None:
    assert not accepts(kind, f"a{character}b")
    assert not accepts(kind, f"ab{character}")


@pytest.mark.parametrize("text", ["küche", "b", "a" * 63, "工作站"])
def test_names_of_peers_may_have_letters_of_all_languages(text: str) -> None:
    assert accepts(PeerName, text)


@pytest.mark.parametrize("text", ["", "a" * 64, "a b", "a:0-12", "a,b", "a/b", " b"])
def test_names_of_peers_cannot_be_mistaken_for_parts_of_a_list_of_stages(text: str) -> None:
    assert not accepts(PeerName, text)


def test_sentences_keep_their_characters() -> None:
    assert accepts(Text, "l'été — 30 °C, 👩\u200d💻, עברית; `x`")
    assert not accepts(Text, "x" * (MAX_TEXT + 1))


@pytest.mark.parametrize("value", [-1, (1 << 26) + 1, 1 << 62, (1 << 64) - 1, 1.5, True, "1", None])
def test_a_number_of_tokens_is_bounded(value: object) -> None:
    assert not accepts(Tokens, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.1])
def test_a_float_is_finite_and_bounded(value: float) -> None:
    assert not accepts(Fraction, value)
    assert accepts(Fraction, 1)


def test_every_named_number_has_both_bounds_and_every_text_a_length_or_a_pattern() -> None:
    kinds = {name: get_args(value) for name, value in vars(bounds).items() if get_args(value)}
    for name, (base, meta) in kinds.items():
        assert meta.title == name
        if base is str:
            assert "{" in meta.pattern or meta.max_length is not None, name
        else:
            assert math.isfinite(meta.ge), name
            assert math.isfinite(meta.le), name
        assert describe(meta)


@given(text=st.text(max_size=80))
def test_printable_makes_a_text_that_fits(text: str) -> None:
    assert accepts(Text, printable(text))
    assert accepts(Text, printable(text * 200, MAX_TEXT))
    assert printable(printable(text)) == printable(text)


def test_printable_shows_what_it_replaces() -> None:
    assert printable("\x1b[2Jred\r\nline\u202e") == "\\x1b[2Jred  line\\u202e"
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
    assert printable("x" * 10, 6) == "xxx..."


def test_the_deepest_model_has_fewer_layers_than_the_bound() -> None:
    assert 126 < MAX_LAYERS <= 4096  # Llama 3.1 405B has 126
