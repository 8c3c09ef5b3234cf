"""Who fetches which piece: every transition of a unit, and random fetches with sources that come, go, dally and lie."""

import random

import pytest

from meshd.agents.machine import IllegalTransition
from meshd.agents.placement.weights.chunks import (
    IN_FLIGHT,
    LATE_S,
    PIECE_BYTES,
    TRANSITIONS,
    UNIT_BYTES,
    Chunk,
    ChunkSchedule,
    ChunkState,
    FileRange,
    file_ranges,
)
from meshd.models.files.manifest import Part
from meshd.types import PeerId

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def parts_of(sizes: dict[str, int]) -> list[Part]:
    parts, offset = [], 0
    for name, size in sizes.items():
        parts.append(Part(name, offset, size, bytes(32)))
        offset += size
    return parts


def spans(*sizes: int) -> list[FileRange]:
    return [FileRange((number,), 10 * UNIT_BYTES * number, size) for number, size in enumerate(sizes)]


def bring(pieces: ChunkSchedule, source: PeerId, piece: Chunk | None) -> object:
    """A piece comes and is written; the unit, if it must be checked."""
    assert piece is not None
    assert pieces.accept(source, piece)
    pieces.validate()
    return pieces.written(piece)


# What is put together


def test_parts_of_one_layer_that_lie_side_by_side_are_one_span() -> None:
    parts = parts_of({"": 100, "token_embd.weight": 50, "blk.0.a": 10, "blk.0.b": 20, "blk.1.a": 10, "output_norm.weight": 5})
    assert [span.parts for span in file_ranges(parts, range(6))] == [(0,), (1,), (2, 3), (4,), (5,)]
    assert [(span.offset, span.length) for span in file_ranges(parts, {2, 3})] == [(150, 30)]
    assert [span.parts for span in file_ranges(parts, {3})] == [(3,)]


def test_a_span_has_no_hole_and_is_bounded() -> None:
    parts = parts_of({"blk.0.a": 10, "blk.0.b": 20, "blk.0.c": 30, "blk.0.d": UNIT_BYTES - 10, "blk.0.e": 2 * UNIT_BYTES})
    assert [span.parts for span in file_ranges(parts, {0, 2, 3, 4})] == [(0,), (2,), (3,), (4,)]
    assert [span.parts for span in file_ranges(parts, {0, 1, 2, 3, 4})] == [(0, 1, 2), (3,), (4,)]


# One source


def test_a_unit_is_asked_for_in_order_two_pieces_at_a_time() -> None:
    pieces = ChunkSchedule(spans(2 * PIECE_BYTES + 5))
    pieces.join(A, None)
    first, second = pieces.next(A, 0), pieces.next(A, 0)
    assert first == Chunk(0, 0, 0, PIECE_BYTES)
    assert second == Chunk(0, 0, PIECE_BYTES, PIECE_BYTES)
    assert pieces.next(A, 0) is None
    assert bring(pieces, A, second) is None
    third = pieces.next(A, 0)
    assert third == Chunk(0, 0, 2 * PIECE_BYTES, 5)
    assert bring(pieces, A, first) is None
    unit = bring(pieces, A, third)
    assert unit is pieces.units[0]
    assert not pieces.done
    pieces.right(pieces.units[0])
    assert pieces.done
    pieces.validate()


def test_a_source_that_is_not_there_is_asked_for_nothing() -> None:
    pieces = ChunkSchedule(spans(5))
    assert pieces.next(A, 0) is None
    pieces.join(A, None)
    piece = pieces.next(A, 0)
    pieces.leave(A)
    assert pieces.next(A, 0) is None
    assert piece is not None
    assert not pieces.accept(A, piece)
    pieces.validate()


def test_a_source_is_asked_for_what_it_has() -> None:
    pieces = ChunkSchedule(spans(5, 5, 5))
    pieces.join(A, [1])
    assert pieces.unoffered() == {0, 2}
    piece = pieces.next(A, 0)
    assert piece is not None
    assert piece.unit == 1
    assert pieces.next(A, 0) is None
    pieces.join(A, [1, 2])
    assert pieces.unoffered() == {0}
    assert pieces.next(A, 0) == Chunk(2, 0, 20 * UNIT_BYTES, 5)


def test_what_a_busy_source_gives_back_is_asked_for_again() -> None:
    pieces = ChunkSchedule(spans(5))
    pieces.join(A, None)
    piece = pieces.next(A, 0)
    assert piece is not None
    pieces.give_back(A, piece)
    pieces.validate()
    assert pieces.next(A, 0) == piece


# Several


def test_sources_take_units_of_their_own_and_then_of_the_slower_ones() -> None:
    pieces = ChunkSchedule(spans(4 * PIECE_BYTES, PIECE_BYTES))
    pieces.join(A, None)
    pieces.join(B, None)
    slow = pieces.next(A, 0)
    quick = pieces.next(B, 0)
    assert slow is not None
    assert quick is not None
    assert (slow.unit, quick.unit) == (0, 1)
    pieces.right(pieces.units[1]) if bring(pieces, B, quick) else None
    helped = [pieces.next(B, 0), pieces.next(B, 0)]
    assert [piece.offset // PIECE_BYTES for piece in helped if piece] == [3, 2]
    assert pieces.next(A, 0) == Chunk(0, 0, PIECE_BYTES, PIECE_BYTES)
    pieces.validate()


def test_a_piece_that_does_not_come_is_asked_of_another_and_the_first_to_bring_it_counts() -> None:
    pieces = ChunkSchedule(spans(5))
    pieces.join(A, None)
    pieces.join(B, None)
    piece = pieces.next(A, 0)
    assert piece is not None
    assert pieces.next(B, LATE_S / 2) is None
    assert pieces.next(B, LATE_S) == piece
    assert pieces.next(B, LATE_S) is None
    pieces.join(C, None)
    assert pieces.next(C, 9 * LATE_S) is None
    assert bring(pieces, B, piece) is pieces.units[0]
    assert not pieces.accept(A, piece)
    pieces.validate()


def test_what_a_source_that_goes_was_asked_for_is_asked_of_others() -> None:
    pieces = ChunkSchedule(spans(3 * PIECE_BYTES))
    pieces.join(A, None)
    pieces.join(B, None)
    bring(pieces, A, pieces.next(A, 0))
    first, second = pieces.next(A, 0), pieces.next(A, 0)
    pieces.leave(A)
    pieces.validate()
    assert {pieces.next(B, 0), pieces.next(B, 0)} == {first, second}


def test_a_wrong_unit_of_one_giver_names_the_liar() -> None:
    pieces = ChunkSchedule(spans(5))
    pieces.join(A, None)
    bring(pieces, A, pieces.next(A, 0))
    assert pieces.wrong(pieces.units[0]) == A
    pieces.validate()
    assert pieces.next(A, 0) == Chunk(0, 1, 0, 5)


def test_a_wrong_unit_of_two_givers_comes_anew_from_one_alone() -> None:
    pieces = ChunkSchedule(spans(2 * PIECE_BYTES))
    pieces.join(A, None)
    pieces.join(B, None)
    bring(pieces, A, pieces.next(A, 0))
    bring(pieces, B, pieces.next(B, 0))
    assert pieces.wrong(pieces.units[0]) is None
    first = pieces.next(A, 0)
    assert pieces.next(B, 10 * LATE_S) is None
    bring(pieces, A, first)
    bring(pieces, A, pieces.next(A, 0))
    assert pieces.wrong(pieces.units[0]) == A


def test_of_a_source_that_lied_nothing_unchecked_is_kept() -> None:
    pieces = ChunkSchedule(spans(3 * PIECE_BYTES, 3 * PIECE_BYTES))
    pieces.join(A, None)
    bring(pieces, A, pieces.next(A, 0))
    pieces.leave(A, lied=True)
    pieces.validate()
    assert pieces.units[0].state is ChunkState.WANTED
    assert pieces.units[0].round == 1


def test_a_unit_begins_anew_only_when_nothing_of_it_is_being_written() -> None:
    """Else the old bytes could come to lie over the new ones."""
    pieces = ChunkSchedule(spans(3 * PIECE_BYTES))
    pieces.join(A, None)
    pieces.join(B, None)
    one, other = pieces.next(A, 0), pieces.next(B, 0)
    assert one is not None
    assert other is not None
    assert pieces.accept(A, one)
    assert pieces.accept(B, other)
    pieces.leave(A, lied=True)
    assert pieces.next(B, 100) is None
    assert pieces.written(one) is None
    assert pieces.next(B, 100) is None
    assert pieces.written(other) is None
    pieces.validate()
    anew = pieces.next(B, 100)
    assert anew is not None
    assert anew.round == 1


# All of it


def test_every_transition_that_is_not_in_the_table_is_refused() -> None:
    for state in ChunkState:
        for target in ChunkState:
            pieces = ChunkSchedule(spans(5))
            pieces.units[0].state = state
            if target in TRANSITIONS[state]:
                pieces._move(pieces.units[0], target)
                assert pieces.units[0].state is target
            else:
                with pytest.raises(IllegalTransition):
                    pieces._move(pieces.units[0], target)


class World:
    """Sources that answer whenever it comes to them; one may lie."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        sizes = [self.rng.choice([5, PIECE_BYTES, 3 * PIECE_BYTES + 1, 7 * PIECE_BYTES]) for _ in range(self.rng.randrange(1, 8))]
        self.pieces = ChunkSchedule(spans(*sizes))
        self.honest = [A, B]
        self.liar = C if self.rng.random() < 0.5 else None
        self.banned: set[PeerId] = set()
        self.asked: list[tuple[PeerId, Chunk]] = []
        self.writing: list[tuple[PeerId, Chunk]] = []
        self.checking: list[int] = []
        self.disk: dict[tuple[int, int], PeerId] = {}
        self.trusted: set[int] = set()
        self.now = 0.0

    def step(self) -> None:
        self.now += self.rng.choice([0.0, 0.1, 2.0])
        often = [self.ask, self.answer, self.write] * 2
        self.rng.choice([*often, self.join, self.ask, self.check, self.leave])()
        self.pieces.validate()
        for source in self.pieces.sources:
            assert sum(asked == source for asked, _ in self.asked) <= IN_FLIGHT

    def join(self) -> None:
        source = self.rng.choice([*self.honest, *([self.liar] if self.liar else [])])
        if source not in self.banned and self.may_come(source):
            have = None if self.rng.random() < 0.7 else self.rng.sample(range(len(self.pieces.units)), len(self.pieces.units) // 2)
            self.pieces.join(source, have)

    def may_come(self, source: PeerId) -> bool:
        return source not in self.pieces.sources and not any(asked == source for asked, _ in self.asked)

    def ask(self) -> None:
        for source in self.rng.sample(sorted(self.pieces.sources), len(self.pieces.sources)):
            piece = self.pieces.next(source, self.now)
            if piece is not None:
                self.asked.append((source, piece))
                return

    def answer(self) -> None:
        if self.asked:
            source, piece = self.asked.pop(self.rng.randrange(len(self.asked)))
            if self.rng.random() < 0.1:
                self.pieces.give_back(source, piece)
            elif self.pieces.accept(source, piece):
                self.writing.append((source, piece))

    def write(self) -> None:
        if self.writing:
            source, piece = self.writing.pop(self.rng.randrange(len(self.writing)))
            assert piece.unit not in self.trusted, "bytes come to lie over checked ones"
            self.disk[piece.unit, piece.offset] = source
            unit = self.pieces.written(piece)
            if unit is not None:
                self.checking.append(unit.number)

    def check(self) -> None:
        if self.checking:
            unit = self.pieces.units[self.checking.pop()]
            givers = {source for (number, _), source in self.disk.items() if number == unit.number}
            if self.liar not in givers:
                self.pieces.right(unit)
                self.trusted.add(unit.number)
                return
            named = self.pieces.wrong(unit)
            if named is not None:
                assert named == self.liar, "an honest source is called a liar"
                self.banned.add(named)
                self.pieces.leave(named, lied=True)

    def leave(self) -> None:
        if self.rng.random() < 0.2 and self.pieces.sources:
            self.pieces.leave(self.rng.choice(sorted(self.pieces.sources)))

    def finish(self) -> None:
        """From here on honest sources stay: it must come to an end."""
        for _ in range(20_000):
            if self.pieces.done:
                return
            for source in self.honest:
                if source in self.pieces.sources or self.may_come(source):
                    self.pieces.join(source, None)
            self.now += 0.5
            for act in (self.ask, self.answer, self.write, self.check):
                act()
            self.pieces.validate()
        raise AssertionError("it never ends")


@pytest.mark.parametrize("seed", range(300))
def test_any_fetch_ends_with_everything_right_and_no_honest_source_accused(seed: int) -> None:
    world = World(seed)
    for _ in range(world.rng.randrange(300)):
        world.step()
    world.finish()
    assert len(world.trusted) == len(world.pieces.units)
    assert world.pieces.unoffered() == set()
