"""Agents that fail: restarts, and the point at which the peer gives up."""

import asyncio

import pytest

from in_process.journals import HandClock
from meshd.agents.supervisor import FAILURES, RESTART_S, WITHIN_S, Supervisor
from meshd.errors import ConfigError


class Agent:
    """Counts its starts, fails when asked to, and keeps its state."""

    def __init__(self) -> None:
        self.starts = 0
        self.sessions = {"s"}
        self._failures: asyncio.Queue[Exception | None] = asyncio.Queue()

    async def run(self) -> None:
        self.starts += 1
        failure = await self._failures.get()
        if failure is not None:
            raise failure

    async def fail(self, clock: HandClock, error: Exception | None) -> None:
        self._failures.put_nowait(error)
        await clock.move(RESTART_S)


async def supervised(agent: Agent) -> tuple[Supervisor, HandClock, asyncio.Task[None]]:
    clock = HandClock()
    supervisor = Supervisor(clock)
    task = asyncio.create_task(supervisor.supervise("agent", agent.run))
    await clock.move(0.0)
    return supervisor, clock, task


async def test_an_agent_that_fails_is_started_again_with_its_state(caplog: pytest.LogCaptureFixture) -> None:
    agent = Agent()
    supervisor, clock, task = await supervised(agent)
    await agent.fail(clock, KeyError(-5))
    assert (agent.starts, agent.sessions, supervisor.gave_up.is_set()) == (2, {"s"}, False)
    assert "agent failed and is started again" in caplog.text
    assert "KeyError: -5" in caplog.text
    await agent.fail(clock, None)
    assert task.done()


async def test_the_peer_gives_up_after_three_failures_in_a_minute() -> None:
    agent = Agent()
    supervisor, clock, task = await supervised(agent)
    for _ in range(FAILURES - 1):
        await agent.fail(clock, KeyError(-5))
    assert not supervisor.gave_up.is_set()
    await agent.fail(clock, ExceptionGroup("tasks", [ValueError("no such layer")]))
    assert supervisor.gave_up.is_set()
    assert supervisor.reason.startswith("agent failed 3 times within ")
    assert supervisor.reason.endswith("ValueError: no such layer")
    assert agent.starts == FAILURES + 1  # it is restarted while the peer drains
    task.cancel()


async def test_failures_that_are_far_apart_are_survived() -> None:
    agent = Agent()
    supervisor, clock, task = await supervised(agent)
    for _ in range(2 * FAILURES):
        await agent.fail(clock, KeyError(-5))
        await clock.move(WITHIN_S / 2)
    assert not supervisor.gave_up.is_set()
    task.cancel()


async def test_a_wrong_setting_is_no_failure_of_an_agent() -> None:
    agent = Agent()
    _, clock, task = await supervised(agent)
    await agent.fail(clock, ConfigError("the port is taken"))
    with pytest.raises(ConfigError):
        await task
    assert agent.starts == 1


async def test_an_agent_that_fails_when_it_is_told_to_end_is_not_started_again() -> None:
    """A group of tasks in which one fails at the moment of a cancellation raises only the failure."""
    lost, starts = asyncio.Event(), 0

    async def fail() -> None:
        await lost.wait()
        raise OSError("lost")

    async def run() -> None:
        nonlocal starts
        starts += 1
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())

    task = asyncio.create_task(Supervisor(HandClock()).supervise("agent", run))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    lost.set()
    task.cancel()
    await asyncio.wait([task], timeout=1.0)
    assert task.cancelled()
    assert starts == 1
