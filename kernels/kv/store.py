"""The stored rows and states of one layer in one lease."""

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from meshd.errors import LocalFault
from meshd.kernels.kv.memory import PAGE_TOKENS, LayerMemory, MemoryKind, pages, reserved_pages
from meshd.kernels.kv.region import Region

F32 = npt.NDArray[np.float32]


@dataclass(slots=True, eq=False)
class LayerStore:
    """Rows of positions `[floor, end)`, each array contiguous over all positions, and the states of a recurrent layer."""

    memory: LayerMemory
    region: Region
    offsets: tuple[int, ...]
    """Where each array begins in the region."""
    slots: int
    """Positions that the arrays have address space for: whole pages."""
    most_pages: int
    """Pages that are reserved."""
    arrays: tuple[npt.NDArray[np.generic], ...]
    """For each kind of row, `[slots, *shape]`."""
    value_bytes: int
    """Bytes of a stored number."""
    page_bytes: int
    """Bytes of a page."""
    floor: int = 0
    """First position whose rows are there; rows before it were given back or never copied."""
    end: int = 0
    states: dict[int, F32] = field(default_factory=dict)
    """Recurrent states by the border that they stand at. The state at 0 is zero and is not stored."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages with rows, and of the states."""
        used = (-(-self.end // PAGE_TOKENS) - self.floor // PAGE_TOKENS) * self.page_bytes
        if self.states:
            used += len(self.states) * self.memory.state_bytes
        return max(0, used)

    @property
    def resumable(self) -> int:
        """The first position above 0 at which the layer can compute on: all that it reads there is still here."""
        if not self.floor:
            return 0
        if self.memory.kind is MemoryKind.RECURRENT:
            whole = [border for border in self.states if border - self.memory.history >= self.floor]
            return min(whole, default=self.end + 1)
        return self.floor + max(0, self.memory.window - 1)

    def check_write(self, start: int, end: int, *, anew: bool = False) -> None:
        """Check that rows of `[start, end)` can be stored; with `anew` that `start_at(start)` is called before.

        Raises: LocalFault.
        """
        if not (anew or self.floor <= start) or not start < end <= self.slots:
            raise LocalFault(f"positions {start} to {end - 1} can't be stored: the lease holds {self.floor} to {self.slots - 1}")
        first, last = (start, end) if anew else (self.floor, max(end, self.end))
        if pages(last) - first // PAGE_TOKENS > self.most_pages:
            raise LocalFault(
                f"a step up to position {end - 1} needs more than the {self.most_pages} pages that the lease reserves: "
                f"its layers keep {self.memory.kept_tokens} tokens"
            )

    def write(self, start: int, rows: tuple[npt.NDArray[np.generic], ...]) -> None:
        """Store rows from position `start` on, each array `[tokens, *shape]`."""
        end = start + len(rows[0])
        for array, values in zip(self.arrays, rows, strict=True):
            array[start:end] = values
        if end > self.end:
            self.end = end

    def read(self, tokens: int) -> tuple[F32, ...]:
        """Read the rows of the pages that hold `[0, tokens)`, as float32. Rows that are not there are finite.

        Returns: for each array, a view if the rows are stored as float32, otherwise a copy.
        """
        stop = pages(tokens) * PAGE_TOKENS
        if self.value_bytes == 4:
            return cast("tuple[F32, ...]", tuple([array[:stop] for array in self.arrays]))
        return tuple(self._widened(array[:stop]) for array in self.arrays)

    def _widened(self, stored: npt.NDArray[np.generic]) -> F32:
        wide: F32 = np.zeros(stored.shape, np.float32)
        first = self.floor // PAGE_TOKENS * PAGE_TOKENS
        wide[first:] = stored[first:]
        return wide

    def truncate(self, end: int) -> None:
        """Forget rows and states from position `end` on, and give their pages back."""
        if end == 0:
            self.floor = 0
        self.end = min(self.end, end)
        self.states = {border: state for border, state in self.states.items() if border <= end}
        self._give_back(pages(end) * PAGE_TOKENS, self.slots)

    def start_at(self, position: int) -> None:
        """Forget everything before `position`, because rows from there on follow without those before."""
        self.truncate(0)
        self.floor = self.end = position

    def commit(self, position: int) -> None:
        """Forget what no step at or after `position` reads, and give its pages back."""
        kept = self.memory.kept_tokens
        if not kept:
            return
        first = position - kept
        if self.memory.kind is MemoryKind.RECURRENT:
            base = max((border for border in self.states if border <= position), default=0)
            self.states = {border: state for border, state in self.states.items() if border >= base}
            first = min(first, base - self.memory.history)
        first = first // PAGE_TOKENS * PAGE_TOKENS
        if first > self.floor:
            self.floor = first
            self._give_back(0, first)

    def set_state(self, border: int, state: F32) -> None:
        """Store a copy of the recurrent state at `border`. Of the states after the oldest one, only the newest is kept.

        Raises: LocalFault if the border is none, or the state has another shape or is not finite.
        """
        if border <= 0 or border % PAGE_TOKENS or border > self.slots:
            raise LocalFault(f"a state can't be stored at position {border}: it is no page border of the lease")
        if state.shape != self.memory.state or not np.isfinite(state).all():
            raise LocalFault(f"the state at position {border} has another shape than {self.memory.state}, or is not finite")
        base = min(self.states, default=border)
        kept = {at: old for at, old in self.states.items() if at == base and at < border}
        self.states = {**kept, border: np.array(state, np.float32)}

    def state_before(self, position: int) -> tuple[int, F32]:
        """Return the newest state at or before `position`, and the border that it stands at.

        Raises: LocalFault if there is none: the layer can't compute at this position.
        """
        border = max((at for at in self.states if at <= position), default=0)
        if border == 0 and self.floor:
            raise LocalFault(f"no state at or before position {position} is kept")
        return border, self.states[border] if border else np.zeros(self.memory.state, np.float32)

    def _give_back(self, first: int, last: int) -> None:
        """Give the memory of the slots `[first, last)` back. One call from an end of the array on, so that small pages add up."""
        for offset, array in zip(self.offsets, self.arrays, strict=True):
            row = array.strides[0]
            self.region.give_back(offset + first * row, offset + last * row)


def make_stores(layout: tuple[LayerMemory, ...], dtype: npt.DTypeLike, capacity: int, step_tokens: int) -> list[LayerStore]:
    """Reserve address space for all layers in one region, and make their stores. Raises: OutOfMemory."""
    slots, item = pages(capacity) * PAGE_TOKENS, np.dtype(dtype).itemsize
    offsets: list[tuple[int, ...]] = []
    size = 0
    for memory in layout:
        places = []
        for shape in memory.rows:
            places.append(size)
            size += Region.aligned(slots * int(np.prod(shape)) * item)
        offsets.append(tuple(places))
    region = Region(size)
    return [
        LayerStore(
            memory,
            region,
            places,
            slots,
            reserved_pages(memory, capacity, step_tokens),
            tuple(region.array(at, (slots, *shape), dtype) for at, shape in zip(places, memory.rows, strict=True)),
            item,
            PAGE_TOKENS * memory.row_values * item,
        )
        for memory, places in zip(layout, offsets, strict=True)
    ]
