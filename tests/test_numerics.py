import msgspec
import pytest

from meshd.numerics import UNKNOWN, NumericsId, is_promised, numerics_id, show_numerics

ONE = numerics_id("onnxruntime", "int8", 512, "0123456789abcdef" * 4, batch_invariant=True)
OTHER = numerics_id("torch-cuda", "f32", 512, "f" * 64, batch_invariant=False)


def test_an_id_shows_what_it_is_of_and_whether_it_promises_anything() -> None:
    assert (ONE, OTHER) == ("onnxruntime/int8/512/0123456789abcdef", "torch-cuda/f32/512/ffffffffffffffff/varies")
    assert [is_promised(numerics) for numerics in (ONE, OTHER, UNKNOWN)] == [True, False, False]


def test_different_ids_are_listed_once_each_in_order() -> None:
    assert show_numerics((OTHER, ONE, OTHER, UNKNOWN)) == f"{OTHER}, {ONE}"
    assert show_numerics((UNKNOWN,)) == ""


@pytest.mark.parametrize("text", [ONE, OTHER, UNKNOWN])
def test_ids_are_valid_on_the_wire(text: NumericsId) -> None:
    assert msgspec.convert(text, NumericsId) == text


@pytest.mark.parametrize(
    "text", ["torch", "a/b/512/0123456789abcdeg", "a/b/512/0123456789abcdef\n", "a/b/512/0123456789abcdef/other"]
)
def test_other_texts_are_no_ids(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, NumericsId)
