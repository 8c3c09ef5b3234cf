"""Progress of long work on standard error: bars on a terminal, occasional lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from meshd.bounds import printable
from meshd.cli.support.output import show
from meshd.display import size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

LINE_EVERY_S = 5.0
_LEAST_COLUMNS = 40


class Progress(Protocol):
    """Progress of several named tasks. Use it as a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def update(self, name: str, done: float, total: float | None, text: str = "") -> None:
        """Show that `done` of `total` (None: unknown) is complete. `text` says what the task is doing now."""
        ...

    def say(self, line: str) -> None:
        """Print a line of its own."""
        ...


def progress(*, of_bytes: bool = False) -> Progress:
    """Return bars if standard error is a terminal that can show them, otherwise lines."""
    if sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal and console.width >= _LEAST_COLUMNS:
            return Bars(console, of_bytes=of_bytes)
    return Lines(of_bytes=of_bytes)


class Lines:
    """Prints a line when a task begins, changes its text or ends, and at most every LINE_EVERY_S in between."""

    def __init__(self, *, of_bytes: bool) -> None:
        self._of_bytes = of_bytes
        self._printed: dict[str, tuple[str, bool, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def update(self, name: str, done: float, total: float | None, text: str = "") -> None:
        now = time.monotonic()
        ended = total is not None and done >= total
        before = self._printed.get(name)
        if before and before[:2] == (text, ended) and (ended or now - before[2] < LINE_EVERY_S):
            return
        self._printed[name] = (text, ended, now)
        show(" ".join(part for part in (f"{name}:", text, self._amount(done, total)) if part), file=sys.stderr)

    def say(self, line: str) -> None:
        show(line, file=sys.stderr)

    def _amount(self, done: float, total: float | None) -> str:
        if self._of_bytes:
            return size(done) + (f" of {size(total)}" if total else "")
        return f"{100 * done / total:.0f} %" if total else ""


class Bars:
    """Shows one bar for each task."""

    def __init__(self, console: "Console", *, of_bytes: bool) -> None:
        from rich.progress import BarColumn, DownloadColumn, ProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        amounts: list[ProgressColumn] = (
            [DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()]
            if of_bytes
            else [TextColumn("{task.percentage:>3.0f} %")]
        )
        name, text = (TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[text]}"))
        self._rich = RichProgress(name, BarColumn(), *amounts, text, console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._rich.stop()

    def update(self, name: str, done: float, total: float | None, text: str = "") -> None:
        text = printable(text)
        if name not in self._tasks:
            self._tasks[name] = self._rich.add_task(printable(name), total=total, text=text)
        self._rich.update(self._tasks[name], completed=done, total=total, text=text)

    def say(self, line: str) -> None:
        self._rich.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Measuring:
    """Shows the progress of a device probe. Nothing is shown if a stored measurement is used."""

    def __init__(self) -> None:
        self._shown: Progress | None = None

    def __call__(self, what: str, fraction: float) -> None:
        """Report that `what` is being measured now, and that `fraction` of the probe is done."""
        if self._shown is None and fraction < 1.0:
            self._shown = progress().__enter__()
        if self._shown is not None:
            self._shown.update("measuring this device", fraction, 1.0, what)
        if fraction >= 1.0:
            self.close()

    def close(self) -> None:
        """Stop showing progress. Idempotent."""
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.__exit__(None, None, None)
