"""Streamed text: stop strings are found across tokens, and no part of one is emitted."""

from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.service import TextDelta
from meshd.agents.session.text import Assembler, StopMatcher
from meshd.types import TokenLogprobs


class Bytes:
    """A tokenizer whose tokens are single bytes of UTF-8. It returns only whole characters."""

    def __init__(self) -> None:
        self.incomplete = b""

    def push(self, token: int) -> str:
        self.incomplete += bytes([token])
        try:
            text = self.incomplete.decode()
        except UnicodeDecodeError:
            return ""
        self.incomplete = b""
        return text

    def flush(self) -> str:
        return self.incomplete.decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


def assembled(text: str, stops: tuple[str, ...], *, logprobs: bool = False) -> tuple[list[TextDelta], bool]:
    assembler = Assembler(Bytes(), Bytes(), StopMatcher(stops), logprobs)
    deltas = []
    for token in text.encode():
        if (delta := assembler.push(token, TokenLogprobs(-0.5) if logprobs else None, end_of_sequence=False)) is not None:
            deltas.append(delta)
        if assembler.stopped:
            return deltas, True
    if (delta := assembler.finish()) is not None:
        deltas.append(delta)
    return deltas, assembler.stopped


@given(st.text(alphabet="ab€🙂", max_size=30), st.lists(st.text(alphabet="ab€🙂", min_size=1, max_size=4), max_size=3))
def test_streamed_text_is_the_whole_text_cut_at_the_first_stop(text: str, stops: list[str]) -> None:
    deltas, stopped = assembled(text, tuple(stops))
    streamed = "".join(delta.text for delta in deltas)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        first_end = min(ends)
        cut = min(text.find(stop) for stop in stops if stop in text[:first_end])
        assert stopped
        assert streamed == text[:cut]
    else:
        assert not stopped
        assert streamed == text


def test_text_that_may_begin_a_stop_string_is_withheld() -> None:
    matcher = StopMatcher(("STOP",))
    assert matcher.push("a ST") == ("a ", False)
    assert matcher.push("AND") == ("STAND", False)
    assert matcher.push(" S") == (" ", False)
    assert matcher.push("TOP!") == ("", True)


def test_every_token_is_in_the_delta_that_contains_its_text() -> None:
    deltas, _ = assembled("a€b", (), logprobs=True)
    assert [delta.text for delta in deltas] == ["a", "€", "b"]
    assert [len(delta.tokens) for delta in deltas] == [1, 3, 1]
