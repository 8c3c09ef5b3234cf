"""One text worker as the daemon sees it: started, given one job at a time, and ended when it takes too long or too much memory."""

import asyncio
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec
import psutil

import meshd
from meshd.models.text.worker.messages import LENGTH, MAX_FRAME_BYTES, OUT_OF_MEMORY, Job, Result, decode_result, encode_frame

_WATCH_S = 0.05
"""How often the memory of a worker is read while it does a job: systems without RLIMIT_AS need that."""
_WALL, _LEAST_WALL_S = 5.0, 10.0
"""A job is also ended after this many times its processor time, but not before this many seconds: on an overloaded machine, or
where the system does not count processor time."""
_END_S = 0.5
"""Time for a worker that has closed its pipe to end before it is killed, so that its exit status says why."""


class WorkerEnded(Exception):
    """The worker ended, or was ended, before its result came. The message says why, as in `it takes more than 10 s`."""


class WorkerProcess:
    """A running text worker. `do` must not be called again before it has returned."""

    def __init__(self, process: Process, memory_bytes: int) -> None:
        self._process = process
        self._memory_bytes = memory_bytes

    @classmethod
    async def start(cls, memory_bytes: int) -> Self:
        """Start a worker that may use `memory_bytes` of memory. Raises: OSError if the system starts no process."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "meshd.models.text.worker", str(memory_bytes)),
            # In the folder that contains meshd it can import meshd, and no file of the user shadows a module.
            cwd=Path(meshd.__file__).parent.parent,
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            start_new_session=True,  # Ctrl-C at the terminal is for the daemon, which ends its workers itself
        )
        return cls(process, memory_bytes)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def do(self, job: Job) -> Result:
        """Have a job done.

        Raises: WorkerEnded if it ended before the result, at a limit or because it failed; InvalidRequest if the job can't be sent.
        Cancel: the worker is killed, since its result would be taken for that of the next job.
        """
        answer = asyncio.ensure_future(self._exchange(encode_frame(job)))
        try:
            async with asyncio.timeout(max(_LEAST_WALL_S, _WALL * job.cpu_s)):
                while not (await asyncio.wait({answer}, timeout=_WATCH_S))[0]:
                    if self.resident_bytes() > self._memory_bytes:
                        raise WorkerEnded(self._too_large())
            return answer.result()
        except TimeoutError:
            raise WorkerEnded(_too_long(job)) from None
        except (asyncio.IncompleteReadError, OSError, msgspec.DecodeError):
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await self._process.wait()
            await self.kill()
            raise WorkerEnded(self._reason(job)) from None
        finally:
            if not answer.done() or answer.cancelled() or answer.exception() is not None:
                answer.cancel()
                await self.kill()

    def resident_bytes(self) -> int:
        """Memory that the process uses now; 0 when it has ended."""
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    async def kill(self) -> None:
        """End the process at once, and wait for its end. Idempotent."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _exchange(self, frame: bytes) -> Result:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(frame)
        await self._process.stdin.drain()
        (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise msgspec.DecodeError("the result is too large")
        result: Result = decode_result(await self._process.stdout.readexactly(length))
        return result

    def _reason(self, job: Job) -> str:
        status = self._process.returncode
        if status == -signal.SIGPROF:
            return _too_long(job)
        if status in (OUT_OF_MEMORY, -signal.SIGABRT):
            return self._too_large()
        return f"the process that does it ended with status {status}"

    def _too_large(self) -> str:
        return f"it takes more than {self._memory_bytes >> 20} MiB of memory"


def _too_long(job: Job) -> str:
    return f"it takes more than {job.cpu_s:.3g} s"
