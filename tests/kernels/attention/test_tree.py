"""Tests which nodes the tree has, that an absent part changes no bit, and that a result does not depend on an element's place."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.errors import LocalFault
from meshd.kernels.attention.tree import Part, merge_nodes, merge_pair, merge_runs
from tiny.qkv import made


def parts_of(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return made(seed, count, 2, 3, 8), made(seed + 1, count, 2, 3) * 10


def node(level: int, index: int, leaves: dict[int, Part]) -> Part | None:
    """Compute a node as the definition says, one pair at a time."""
    if level == 0:
        return leaves.get(index)
    left, right = (node(level - 1, child, leaves) for child in (2 * index, 2 * index + 1))
    return merge_pair(left, right) if left and right else left or right


def bits(part: Part | None) -> bytes:
    assert part
    return part[0].tobytes() + part[1].tobytes()


@given(first=st.integers(0, 40), count=st.integers(1, 40))
@settings(deadline=None)
def test_nodes_merge_as_the_definition_says(first: int, count: int) -> None:
    o, lse = parts_of(count)
    leaves = {first + i: (o[i], lse[i]) for i in range(count)}
    assert bits(merge_nodes(o, lse, first)) == bits(node(7, 0, leaves))


@given(held=st.sets(st.integers(0, 63), min_size=1), data=st.randoms(use_true_random=False))
@settings(deadline=None)
def test_runs_merge_as_the_definition_says(held: set[int], data: random.Random) -> None:
    """The runs are a random cut of the tree, given in any order; spans are missing at the ends and in the middle."""
    o, lse = parts_of(64)
    leaves = {span: (o[span], lse[span]) for span in held}

    def cut(level: int, index: int) -> list[tuple[range, Part]]:
        if level and data.random() < 0.7:
            return cut(level - 1, 2 * index) + cut(level - 1, 2 * index + 1)
        part = node(level, index, leaves)
        return [(range(index << level, (index + 1) << level), part)] if part else []

    runs = cut(6, 0)
    data.shuffle(runs)
    assert bits(merge_runs(runs)) == bits(node(6, 0, leaves))


def test_an_absent_part_changes_no_bit() -> None:
    """Zeros of both signs, tiny and huge values; a row that is absent on both sides stays absent."""
    o = np.array([[[-0.0, 0.0, 1e-45, -3e38]] * 4], np.float32)
    lse = np.array([[-0.0, 3.25, -1e30, 80.0]], np.float32)
    absent = np.zeros_like(o), np.full_like(lse, -np.inf)
    assert bits(merge_pair((o, lse), absent)) == bits(merge_pair(absent, (o, lse))) == bits((o, lse))
    assert bits(merge_pair(absent, absent)) == bits(absent)
    half = lse.copy()
    half[0, 1:3] = -np.inf
    mixed = merge_pair((o, half), (o[:, ::-1], lse))
    assert mixed[0][0, 1:3].tobytes() == o[0, 1:3].tobytes()
    assert mixed[1][0, 1:3].tobytes() == lse[0, 1:3].tobytes()


def test_a_part_that_outweighs_the_other_is_the_result() -> None:
    big, small = ((np.full((1, 1, 1), o, np.float32), np.full((1, 1), lse, np.float32)) for o, lse in ((1.5, 200), (-3, -200)))
    for pair in ((big, small), (small, big)):
        assert bits(merge_pair(*pair)) == bits(big)


def test_an_order_of_another_tree_has_other_bits() -> None:
    """So the equalities of these tests say something."""
    o, lse = parts_of(4)
    left = (o[0], lse[0])
    for i in range(1, 4):
        left = merge_pair(left, (o[i], lse[i]))
    assert bits(left) != bits(merge_nodes(o, lse, 0))


@pytest.mark.parametrize("runs", [[], [range(1, 3)], [range(3)], [range(4), range(2, 4)], [range(0)], [range(0, 4, 2)]])
def test_runs_that_are_no_nodes_are_refused(runs: list[range]) -> None:
    part = made(0, 1, 1, 4), made(1, 1, 1)
    with pytest.raises(LocalFault):
        merge_runs([(run, part) for run in runs])


@pytest.mark.parametrize("operation", [np.exp, np.log, lambda x: np.logaddexp(x, np.float32(0.3))])
def test_the_bits_of_a_number_do_not_depend_on_its_place(operation: Callable[[np.ndarray], np.ndarray]) -> None:
    """Of 3,000 numbers each is computed alone, and in arrays of other lengths, alignments and strides."""
    numbers = np.abs(made(3, 3000)) * 12
    numbers = numbers if operation is np.log else -numbers
    alone = np.array([operation(numbers[i : i + 1])[0] for i in range(len(numbers))])
    for length, offset in itertools.product((2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 2047), (0, 1, 3)):
        for begin in range(offset, len(numbers) - length, max(length, 97)):
            got = operation(numbers[begin : begin + length])
            assert got.tobytes() == alone[begin : begin + length].tobytes()
    for step in (2, 3, 9):
        assert operation(numbers[::step]).tobytes() == alone[::step].tobytes()
        backwards = np.empty(3000, np.float32)[::-1]
        backwards[...] = operation(numbers[::-1])
        assert backwards[::-1].tobytes() == alone.tobytes()
