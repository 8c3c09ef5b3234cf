"""What a check of `meshd doctor` is: a function with a stable id, which finds results. All run at once, each with a deadline."""

import asyncio
import inspect
import subprocess
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from meshd.agents.admin.reach import PeerReach
from meshd.agents.cluster_service import CheckResult, CheckStatus, CheckStep, PlanRequest
from meshd.agents.membership.interfaces import Interface, present_interfaces
from meshd.clock import Clock
from meshd.config import Config
from meshd.errors import MeshdError
from meshd.types import PeerId

DEADLINE_S = 20.0
COMMAND_S = 5.0


class CommandOutput(NamedTuple):
    """What a command of the system printed."""

    status: int
    text: str
    """Standard output, then standard error."""


def run_command(words: Sequence[str]) -> CommandOutput | None:
    """Run a command of the system that only looks. Returns: None if it is not installed, or does not end in time."""
    try:
        done = subprocess.run(
            list(words), capture_output=True, text=True, timeout=COMMAND_S, check=False, stdin=subprocess.DEVNULL, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return CommandOutput(done.returncode, done.stdout + done.stderr)


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePeer:
    """The running daemon, for the checks that need one."""

    id: PeerId
    cluster: str
    """The cluster's fingerprint."""
    link: str
    """`HOST:PORT` where links listen."""
    api: str
    linked: Callable[[], list[PeerId]]
    rows: Callable[[], list[dict[str, Any]]]
    """The rows of `GET /mesh/v1/peers`."""
    notices: Callable[[], list[tuple[str, str]]]
    reach: Callable[[PeerId], Awaitable[PeerReach]]
    dial: Callable[[str, int], Awaitable[PeerId]]
    """Dials an address once. Returns: the peer that answers."""
    plan: Callable[[PlanRequest], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What checks look at. Tests replace the parts that they cannot make real."""

    config: Config
    clock: Clock
    model: str | None = None
    peer: LivePeer | None = None
    """None: the daemon does not run."""
    root: Path = Path("/")
    """The folder that contains `proc`, `sys`, `etc` and `run`."""
    command: Callable[[Sequence[str]], CommandOutput | None] = run_command
    interfaces: Callable[[], list[Interface]] = present_interfaces


Found = Iterable[CheckResult]


@dataclass(frozen=True, slots=True)
class Check:
    """One check. A function that waits for the network is asynchronous; others run in a thread of their own."""

    id: str
    run: Callable[[Context], Found | Awaitable[Found]]
    deadline_s: float = DEADLINE_S


def ok(check: str, found: str, subject: str = "") -> CheckResult:
    return CheckResult(check=check, status=CheckStatus.OK, found=found, subject=subject)


def warning(check: str, found: str, mend: str, subject: str = "") -> CheckResult:
    return CheckResult(check=check, status=CheckStatus.WARNING, found=found, mend=mend, subject=subject)


def wrong(check: str, found: str, mend: str, subject: str = "") -> CheckResult:
    return CheckResult(check=check, status=CheckStatus.WRONG, found=found, mend=mend, subject=subject)


def unchecked(check: str, found: str, mend: str = "", subject: str = "") -> CheckResult:
    return CheckResult(check=check, status=CheckStatus.UNCHECKED, found=found, mend=mend, subject=subject)


def read_text(path: Path) -> str:
    """Read a small file of the system. Returns: empty text if there is none, or it can't be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


@dataclass(slots=True)
class Runner:
    """Runs checks. A check that hangs keeps its thread; it is not started again until that thread ends."""

    checks: tuple[Check, ...]
    running: bool = False
    """Whether `run` runs. It must not be called then."""
    _hanging: set[str] = field(default_factory=set)

    async def run(self, context: Context) -> AsyncGenerator[CheckStep, None]:
        """Run all checks at once. Yields: a step whenever a check is done. Cancel: ends the asynchronous checks."""
        self.running = True
        tasks = [asyncio.create_task(self._results(check, context)) for check in self.checks]
        try:
            for done, task in enumerate(asyncio.as_completed(tasks), 1):
                check, results = await task
                yield CheckStep(check=check, done=done, total=len(tasks), results=results)
        finally:
            self.running = False
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _results(self, check: Check, context: Context) -> tuple[str, tuple[CheckResult, ...]]:
        try:
            async with asyncio.timeout(check.deadline_s):
                if inspect.iscoroutinefunction(check.run):
                    return check.id, tuple(await check.run(context))
                return check.id, tuple(await self._in_thread(check, context))
        except TimeoutError:
            found = f"no result within {check.deadline_s:g} s"
        except MeshdError as error:
            return check.id, (wrong(check.id, error.message, error.hint or "see the daemon's log"),)
        except OSError as error:
            found = f"{error.filename or 'the system'}: {error.strerror or error}"
        except Exception as error:
            found = f"the check itself failed (a bug in meshd): {type(error).__name__}: {error}"
        return check.id, (unchecked(check.id, found, "type `meshd doctor` again"),)

    async def _in_thread(self, check: Check, context: Context) -> Found:
        """Run a check in a new daemon thread: a disk that hangs must not occupy the threads of the rest, nor keep the process."""
        if check.id in self._hanging:
            return [unchecked(check.id, "an earlier check still hangs, as on a disk or network folder that does not answer")]
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[list[CheckResult]] = loop.create_future()

        def settle(results: list[CheckResult], error: Exception | None) -> None:
            self._hanging.discard(check.id)
            if outcome.done():
                return
            if error is None:
                outcome.set_result(results)
            else:
                outcome.set_exception(error)

        def work() -> None:
            results: list[CheckResult] = []
            failure: Exception | None = None
            try:
                found = check.run(context)
                assert not isinstance(found, Awaitable)
                results = list(found)
            except Exception as error:
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, results, failure)

        self._hanging.add(check.id)
        threading.Thread(target=work, name=f"doctor {check.id}", daemon=True).start()
        return await outcome
