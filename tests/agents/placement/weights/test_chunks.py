"""The chunk schedule: which source is asked for which chunk, and random fetches with slow, leaving and corrupt sources."""

import random

import pytest

from meshd.agents.placement.weights.chunks import IN_FLIGHT, LATE_S, RANGE_BYTES, ChunkSchedule, file_ranges
from meshd.agents.placement.weights.transfer import CHUNK_BYTES, Chunk, FileRange, TransferState
from meshd.models.files.manifest import Part
from meshd.types import PeerId

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def parts_of(sizes: dict[str, int]) -> list[Part]:
    parts, offset = [], 0
    for name, size in sizes.items():
        parts.append(Part(name, offset, size, bytes(32)))
        offset += size
    return parts


def ranges(*sizes: int) -> list[FileRange]:
    return [FileRange((number,), 10 * RANGE_BYTES * number, size) for number, size in enumerate(sizes)]


def bring(schedule: ChunkSchedule, source: PeerId, chunk: Chunk | None) -> object:
    """Accept and write a chunk. Returns: the transfer to check if the chunk was its last one, otherwise None."""
    assert chunk is not None
    assert schedule.accept(source, chunk)
    schedule.validate()
    return schedule.written(chunk)


def test_adjacent_parts_of_one_layer_are_one_range() -> None:
    parts = parts_of({"": 100, "token_embd.weight": 50, "blk.0.a": 10, "blk.0.b": 20, "blk.1.a": 10, "output_norm.weight": 5})
    assert [one.parts for one in file_ranges(parts, range(6))] == [(0,), (1,), (2, 3), (4,), (5,)]
    assert [(one.offset, one.length) for one in file_ranges(parts, {2, 3})] == [(150, 30)]
    assert [one.parts for one in file_ranges(parts, {3})] == [(3,)]


def test_a_range_has_no_hole_and_is_bounded() -> None:
    parts = parts_of({"blk.0.a": 10, "blk.0.b": 20, "blk.0.c": 30, "blk.0.d": RANGE_BYTES - 10, "blk.0.e": 2 * RANGE_BYTES})
    assert [one.parts for one in file_ranges(parts, {0, 2, 3, 4})] == [(0,), (2,), (3,), (4,)]
    assert [one.parts for one in file_ranges(parts, {0, 1, 2, 3, 4})] == [(0, 1, 2), (3,), (4,)]


def test_a_range_is_asked_for_in_order_two_chunks_at_a_time() -> None:
    schedule = ChunkSchedule(ranges(2 * CHUNK_BYTES + 5))
    schedule.join(A, None)
    first, second = schedule.next(A, 0), schedule.next(A, 0)
    assert first == Chunk(0, 0, 0, CHUNK_BYTES)
    assert second == Chunk(0, 0, CHUNK_BYTES, CHUNK_BYTES)
    assert schedule.next(A, 0) is None
    assert bring(schedule, A, second) is None
    third = schedule.next(A, 0)
    assert third == Chunk(0, 0, 2 * CHUNK_BYTES, 5)
    assert bring(schedule, A, first) is None
    transfer = bring(schedule, A, third)
    assert transfer is schedule.transfers[0]
    assert not schedule.done
    schedule.verified(schedule.transfers[0])
    assert schedule.done
    schedule.validate()


def test_a_source_that_has_not_joined_or_has_left_is_asked_for_nothing() -> None:
    schedule = ChunkSchedule(ranges(5))
    assert schedule.next(A, 0) is None
    schedule.join(A, None)
    chunk = schedule.next(A, 0)
    schedule.leave(A)
    assert schedule.next(A, 0) is None
    assert chunk is not None
    assert not schedule.accept(A, chunk)
    schedule.validate()


def test_a_source_is_asked_only_for_parts_that_it_has() -> None:
    schedule = ChunkSchedule(ranges(5, 5, 5))
    schedule.join(A, [1])
    assert schedule.unoffered() == {0, 2}
    chunk = schedule.next(A, 0)
    assert chunk is not None
    assert chunk.transfer == 1
    assert schedule.next(A, 0) is None
    schedule.join(A, [1, 2])
    assert schedule.unoffered() == {0}
    assert schedule.next(A, 0) == Chunk(2, 0, 20 * RANGE_BYTES, 5)


def test_a_chunk_that_a_busy_source_refuses_is_asked_for_again() -> None:
    schedule = ChunkSchedule(ranges(5))
    schedule.join(A, None)
    chunk = schedule.next(A, 0)
    assert chunk is not None
    schedule.give_back(A, chunk)
    schedule.validate()
    assert schedule.next(A, 0) == chunk


def test_a_source_with_no_range_left_helps_with_the_range_of_a_slower_one() -> None:
    schedule = ChunkSchedule(ranges(4 * CHUNK_BYTES, CHUNK_BYTES))
    schedule.join(A, None)
    schedule.join(B, None)
    slow = schedule.next(A, 0)
    quick = schedule.next(B, 0)
    assert slow is not None
    assert quick is not None
    assert (slow.transfer, quick.transfer) == (0, 1)
    schedule.verified(schedule.transfers[1]) if bring(schedule, B, quick) else None
    helped = [schedule.next(B, 0), schedule.next(B, 0)]
    assert [chunk.offset // CHUNK_BYTES for chunk in helped if chunk] == [3, 2]
    assert schedule.next(A, 0) == Chunk(0, 0, CHUNK_BYTES, CHUNK_BYTES)
    schedule.validate()


def test_a_late_chunk_is_asked_of_another_source_and_the_first_answer_counts() -> None:
    schedule = ChunkSchedule(ranges(5))
    schedule.join(A, None)
    schedule.join(B, None)
    chunk = schedule.next(A, 0)
    assert chunk is not None
    assert schedule.next(B, LATE_S / 2) is None
    assert schedule.next(B, LATE_S) == chunk
    assert schedule.next(B, LATE_S) is None
    schedule.join(C, None)
    assert schedule.next(C, 9 * LATE_S) is None
    assert bring(schedule, B, chunk) is schedule.transfers[0]
    assert not schedule.accept(A, chunk)
    schedule.validate()


def test_the_open_chunks_of_a_source_that_leaves_are_asked_of_others() -> None:
    schedule = ChunkSchedule(ranges(3 * CHUNK_BYTES))
    schedule.join(A, None)
    schedule.join(B, None)
    bring(schedule, A, schedule.next(A, 0))
    first, second = schedule.next(A, 0), schedule.next(A, 0)
    schedule.leave(A)
    schedule.validate()
    assert {schedule.next(B, 0), schedule.next(B, 0)} == {first, second}


def test_a_corrupt_range_from_one_source_identifies_it() -> None:
    schedule = ChunkSchedule(ranges(5))
    schedule.join(A, None)
    bring(schedule, A, schedule.next(A, 0))
    assert schedule.corrupt(schedule.transfers[0]) == A
    schedule.validate()
    assert schedule.next(A, 0) == Chunk(0, 1, 0, 5)


def test_a_corrupt_range_from_two_sources_is_fetched_again_from_one_alone() -> None:
    schedule = ChunkSchedule(ranges(2 * CHUNK_BYTES))
    schedule.join(A, None)
    schedule.join(B, None)
    bring(schedule, A, schedule.next(A, 0))
    bring(schedule, B, schedule.next(B, 0))
    assert schedule.corrupt(schedule.transfers[0]) is None
    first = schedule.next(A, 0)
    assert schedule.next(B, 10 * LATE_S) is None
    bring(schedule, A, first)
    bring(schedule, A, schedule.next(A, 0))
    assert schedule.corrupt(schedule.transfers[0]) == A


def test_unchecked_chunks_of_a_banned_source_are_discarded() -> None:
    schedule = ChunkSchedule(ranges(3 * CHUNK_BYTES, 3 * CHUNK_BYTES))
    schedule.join(A, None)
    bring(schedule, A, schedule.next(A, 0))
    schedule.leave(A, banned=True)
    schedule.validate()
    assert schedule.transfers[0].state is TransferState.WANTED
    assert schedule.transfers[0].round == 1


def test_a_range_begins_a_new_round_only_when_none_of_its_chunks_is_being_written() -> None:
    """Otherwise old bytes could overwrite new ones."""
    schedule = ChunkSchedule(ranges(3 * CHUNK_BYTES))
    schedule.join(A, None)
    schedule.join(B, None)
    one, other = schedule.next(A, 0), schedule.next(B, 0)
    assert one is not None
    assert other is not None
    assert schedule.accept(A, one)
    assert schedule.accept(B, other)
    schedule.leave(A, banned=True)
    assert schedule.next(B, 100) is None
    assert schedule.written(one) is None
    assert schedule.next(B, 100) is None
    assert schedule.written(other) is None
    schedule.validate()
    anew = schedule.next(B, 100)
    assert anew is not None
    assert anew.round == 1


class World:
    """Simulates a fetch from sources that answer in a random order; one source may send wrong bytes."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        sizes = [self.rng.choice([5, CHUNK_BYTES, 3 * CHUNK_BYTES + 1, 7 * CHUNK_BYTES]) for _ in range(self.rng.randrange(1, 8))]
        self.schedule = ChunkSchedule(ranges(*sizes))
        self.honest = [A, B]
        self.corrupt_source = C if self.rng.random() < 0.5 else None
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
        self.schedule.validate()
        for source in self.schedule.sources:
            assert sum(asked == source for asked, _ in self.asked) <= IN_FLIGHT

    def join(self) -> None:
        source = self.rng.choice([*self.honest, *([self.corrupt_source] if self.corrupt_source else [])])
        if source not in self.banned and self.may_join(source):
            have = (
                None
                if self.rng.random() < 0.7
                else self.rng.sample(range(len(self.schedule.transfers)), len(self.schedule.transfers) // 2)
            )
            self.schedule.join(source, have)

    def may_join(self, source: PeerId) -> bool:
        return source not in self.schedule.sources and not any(asked == source for asked, _ in self.asked)

    def ask(self) -> None:
        for source in self.rng.sample(sorted(self.schedule.sources), len(self.schedule.sources)):
            chunk = self.schedule.next(source, self.now)
            if chunk is not None:
                self.asked.append((source, chunk))
                return

    def answer(self) -> None:
        if self.asked:
            source, chunk = self.asked.pop(self.rng.randrange(len(self.asked)))
            if self.rng.random() < 0.1:
                self.schedule.give_back(source, chunk)
            elif self.schedule.accept(source, chunk):
                self.writing.append((source, chunk))

    def write(self) -> None:
        if self.writing:
            source, chunk = self.writing.pop(self.rng.randrange(len(self.writing)))
            assert chunk.transfer not in self.trusted, "a write overwrites checked bytes"
            self.disk[chunk.transfer, chunk.offset] = source
            transfer = self.schedule.written(chunk)
            if transfer is not None:
                self.checking.append(transfer.number)

    def check(self) -> None:
        if self.checking:
            transfer = self.schedule.transfers[self.checking.pop()]
            senders = {source for (number, _), source in self.disk.items() if number == transfer.number}
            if self.corrupt_source not in senders:
                self.schedule.verified(transfer)
                self.trusted.add(transfer.number)
                return
            named = self.schedule.corrupt(transfer)
            if named is not None:
                assert named == self.corrupt_source, "an honest source is banned"
                self.banned.add(named)
                self.schedule.leave(named, banned=True)

    def leave(self) -> None:
        if self.rng.random() < 0.2 and self.schedule.sources:
            self.schedule.leave(self.rng.choice(sorted(self.schedule.sources)))

    def finish(self) -> None:
        """Finish the fetch, with the honest sources joined all the time. Raises: AssertionError if the fetch does not end."""
        for _ in range(20_000):
            if self.schedule.done:
                return
            for source in self.honest:
                if source in self.schedule.sources or self.may_join(source):
                    self.schedule.join(source, None)
            self.now += 0.5
            for act in (self.ask, self.answer, self.write, self.check):
                act()
            self.schedule.validate()
        raise AssertionError("the fetch never ends")


@pytest.mark.parametrize("seed", range(300))
def test_any_fetch_ends_with_all_parts_right_and_no_honest_source_banned(seed: int) -> None:
    world = World(seed)
    for _ in range(world.rng.randrange(300)):
        world.step()
    world.finish()
    assert len(world.trusted) == len(world.schedule.transfers)
    assert world.schedule.unoffered() == set()
