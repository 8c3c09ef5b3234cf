"""The tree of errors: its drawing, codes and texts."""

import re
from collections.abc import Iterator

from meshd import errors
from meshd.errors import DoesNotFit, InvalidRequest, LocalFault, MeshdError, NotReady, Overloaded, PeerLost


def tree(kind: type[MeshdError]) -> Iterator[type[MeshdError]]:
    """Yield a class and all its subclasses in this module, each after its parent."""
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


def test_the_docstring_draws_every_error_below_its_parent() -> None:
    assert errors.__doc__ is not None
    parents: list[str] = []
    drawn: list[tuple[str, str | None]] = []
    for indent, name in re.findall(r"^([ |+-]*)([A-Z]\w+)  ", errors.__doc__, re.MULTILINE):
        depth = len(indent) // 4
        parents[depth:] = [name]
        drawn.append((name, parents[depth - 1] if depth else None))
    assert drawn == [(kind.__name__, kind.__base__.__name__ if kind is not MeshdError else None) for kind in tree(MeshdError)]


def test_codes_are_unique() -> None:
    codes = [kind.__dict__["code"] for kind in tree(MeshdError) if "code" in kind.__dict__]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)


def test_a_class_without_a_code_has_that_of_its_parent() -> None:
    assert LocalFault("x").code == MeshdError.code == "internal_error"


def test_the_text_is_the_message_with_the_hint() -> None:
    assert str(PeerLost("the link broke")) == "the link broke"
    assert str(InvalidRequest("no such field", param="n", hint="see the docs")) == "no such field; see the docs"


def test_temporary_errors_say_when_to_try_again() -> None:
    assert Overloaded("full", retry_after_s=3.0).retry_after_s == 3.0
    assert (NotReady("loading", progress=0.5).retry_after_s, NotReady("loading", progress=0.5).progress) == (1.0, 0.5)
    assert (DoesNotFit("large", missing_bytes=7).retry_after_s, DoesNotFit("large", missing_bytes=7).missing_bytes) == (10.0, 7)
