"""Token ids in a payload: which are decoded and which are refused."""

import numpy as np
import pytest

from meshd.agents.stage.steps import token_ids
from meshd.errors import ProtocolViolation


def payload(*ids: int) -> memoryview:
    return memoryview(np.array(ids, dtype="<i4").tobytes())


def test_all_ids_of_the_vocabulary_are_decoded_in_order() -> None:
    assert token_ids(payload(7, 0, 9), 3, vocab=10).tolist() == [7, 0, 9]
    assert token_ids(payload(), 0, vocab=10).tolist() == []


@pytest.mark.parametrize("outside", [-1, 10, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_refused(outside: int) -> None:
    with pytest.raises(ProtocolViolation, match="outside the vocabulary"):
        token_ids(payload(1, outside, 2), 3, vocab=10)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_payload_of_another_length_is_refused(tokens: int) -> None:
    with pytest.raises(ProtocolViolation, match=f"{4 * tokens} bytes, but the payload has 8"):
        token_ids(payload(1, 2), tokens, vocab=10)
    with pytest.raises(ProtocolViolation, match="the payload has 7"):
        token_ids(payload(1, 2)[:7], 2, vocab=10)
