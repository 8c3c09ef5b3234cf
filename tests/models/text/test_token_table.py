"""Tokens to text: pieces of characters, thoughts between control tokens, and answers of several messages."""

from array import array

import pytest

from meshd.models.text.token_table import TokenTable, joined

CHANNELS = {name: f"<|{name}|>" for name in ("start", "channel", "message", "end", "return", "call")}


def table_of(*control: str, words: tuple[str, ...] = (), leading_space: bool = False) -> tuple[TokenTable, dict[str, int]]:
    """Make a table of these tokens. Returns: it, and the id of each token's text."""
    texts = (*control, *words)
    table = TokenTable.of([text.encode() for text in texts], range(len(control)), leading_space=leading_space)
    return table, {text: id_ for id_, text in enumerate(texts)}


def stream(table: TokenTable, ids: list[int], after: int | None = None) -> str:
    decoder = table.stream(after=after)
    return "".join([*map(decoder.push, ids), decoder.flush()])


def test_a_table_has_the_bytes_of_each_token() -> None:
    pieces, ends = joined([b"ab", b"", b"\xe2\x82", b"\xac"])
    table = TokenTable(pieces, array("I", ends.tobytes()), [1])
    assert [table.token_bytes(id_) for id_ in range(-1, 5)] == [b"", b"ab", b"", b"\xe2\x82", b"\xac", b""]
    assert (len(table), table.longest_bytes, table.is_control(1), table.is_control(0)) == (4, 2, True, False)
    assert table.decode([0, 2, 3]) == stream(table, [0, 2, 3]) == "ab\u20ac"
    assert table.nbytes < 100
    assert TokenTable(b"", [], []).longest_bytes == 0


@pytest.mark.parametrize("mark", [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>")])
def test_a_thought_between_control_tokens_does_not_run_into_the_answer(mark: tuple[str, str]) -> None:
    table, ids = table_of(*mark, "<|im_end|>", words=("a", "b"))
    answer = [ids[token] for token in (mark[0], "a", mark[1], "b", "<|im_end|>")]
    assert stream(table, answer) == table.decode(answer) == "<think>a</think>b"


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (
            "channel analysis message X end start assistant channel final message Y return",
            "<think>X</think>Y",
        ),
        ("channel final message Y return", "Y"),
        ("channel analysis message X", "<think>X"),
        ("channel commentary message X end start assistant channel final message Y", "XY"),
        (
            "channel analysis message X end channel analysis message X end",
            "<think>X</think><think>X</think>",
        ),
        ("channel analysis message X call", "<think>X</think>"),
        ("X Y", "XY"),
    ],
)
def test_an_answer_of_several_messages_is_shown_without_their_headers(tokens: str, text: str) -> None:
    table, ids = table_of(*CHANNELS.values(), words=("analysis", "final", "commentary", "assistant", "X", "Y"))
    assert stream(table, [ids[CHANNELS.get(token, token)] for token in tokens.split()], after=ids["assistant"]) == text


def test_a_space_that_encoding_adds_is_removed_once() -> None:
    table, ids = table_of("<s>", words=(" a", " b"), leading_space=True)
    answer = [ids[" a"], ids[" b"]]
    assert stream(table, answer) == stream(table, answer, after=ids["<s>"]) == "a b"
    assert stream(table, answer, after=ids[" b"]) == " a b"
