"""What is known of each kind of weights agrees in all the tables that name kinds."""

from meshd.kernels.weights import load
from meshd.models.files import gguf_header
from meshd.tensors import HELD_BITS


def test_every_kind_that_can_be_read_has_a_size_in_memory() -> None:
    """Without one, cards and plans count 32 bits for each weight."""
    assert set(HELD_BITS) == set(load.KINDS)


def test_every_kind_that_can_be_read_has_a_number_in_gguf() -> None:
    assert set(load.KINDS) <= {name for name, _, _ in gguf_header.KINDS.values()}
