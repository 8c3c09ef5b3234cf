"""Which steps are computed together, and which peer a failed stage blames."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from meshd.agents.stage import runner
from meshd.agents.stage.batch.compute import BatchComputation, BatchStep
from meshd.protocol.messages import Failed, Resume, StepKind, Tokens
from meshd.types import SessionId
from stage_mesh.driver import SESSION
from stage_mesh.mesh import StageMesh
from stage_mesh.sessions import ANSWER, driver, sent_tokens, stage_of, until_empty
from whole_pass import WholePass


@pytest.mark.parametrize("stages", [("0-4",), ("0-2", "2-4")])
async def test_steps_that_arrive_together_are_computed_together(
    mesh: StageMesh, stages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of several sessions are a message each, and steps of several sessions are one message."""
    sizes: list[int] = []

    def recorded(batch: Sequence[BatchStep]) -> BatchComputation:
        sizes.append(len(batch))
        return BatchComputation(batch)

    monkeypatch.setattr(runner, "BatchComputation", recorded)
    peers = [mesh.start(name) for name in "ab"[: len(stages)]]
    sessions = [driver(mesh, peers[0]) for _ in range(4)]
    for number, session in enumerate(sessions):
        session.session = SessionId(f"{number:032x}")
        await session.open(*zip(peers, stages, strict=True))
    for session in sessions:
        session.send_prompt()
    for session in sessions:
        await session.wait_tokens(ANSWER)
    decodes = len(stages) * (ANSWER - 1)
    assert sizes[-10:] == [4] * 10
    assert len(sizes) < 1.2 * decodes, f"{decodes} passes with a step of each session would do"


async def test_hidden_states_that_are_not_finite_are_the_senders_fault(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((a, "0-2"), (b, "2-4"))
    bad = np.full((1, 128), np.nan, np.float32)
    session.send_step(1, bad.data.cast("B"), start=0, tokens=1, kind=StepKind.PREFILL, committed=1)
    await session.until(lambda: a.received(Failed))
    (failed,) = a.received(Failed)
    assert (failed.blame, failed.stage) == (a.id, 1)
    assert "not finite" in failed.message


async def test_a_stage_that_computes_values_that_are_not_finite_blames_its_own_peer(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, b)
    await session.open((a, "0-2"), (b, "2-4"))
    stage = stage_of(a).stage

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(stage, name)

        def begin(self, hidden: Any, segments: Any) -> WholePass:
            broken = np.full((len(hidden), 128), np.inf, np.float32)
            return WholePass(lambda: stage.decode(broken.data.cast("B"), "f32", len(hidden)))

    stage_of(a).stage = Broken()
    session.send_prompt()
    await session.until(lambda: b.received(Failed))
    assert b.received(Failed)[0].blame == a.id
    assert not sent_tokens(a), "the invalid output is not sent"


@pytest.mark.parametrize(
    ("changes", "payload", "message_part"),
    [
        ({"start": 3, "committed": 4}, 512, "came where one from 0 to 0 was due"),
        ({"tokens": 2, "committed": 2}, 512, "torn"),
        ({}, 256, "torn"),
        ({"seq": 4}, 512, "without credit"),
        ({"committed": 0}, 512, "commits 0"),
        ({"kind": StepKind.DECODE}, 512, "samples 0"),
        ({"kind": StepKind.REFILL}, 512, "not of positions that were computed"),
    ],
)
async def test_an_invalid_step_is_the_senders_fault(
    mesh: StageMesh, changes: dict[str, Any], payload: int, message_part: str
) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((a, "0-2"), (b, "2-4"))
    fields: dict[str, Any] = {"start": 0, "tokens": 1, "kind": StepKind.PREFILL, "committed": 1}
    session.send_step(1, bytes(payload), **{**fields, **changes})
    await session.until(lambda: a.received(Failed))
    (failed,) = a.received(Failed)
    assert failed.blame == a.id
    assert message_part in failed.message


@pytest.mark.parametrize("token", [50_000, 2**30])
async def test_a_token_outside_the_vocabulary_is_its_senders_fault(mesh: StageMesh, token: int) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((a, "0-2"), (b, "2-4"))
    b.links.send(a.id, Tokens(session=SESSION, epoch=1, index=0, tokens=(1, token)))
    await session.until(lambda: a.received(Failed))
    assert a.received(Failed)[0].blame == b.id


async def test_an_impossible_resume_is_the_coordinators_fault(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((b, "0-4"), resume=True)
    session.send(0, Resume, stage=0, start=5, send_from=0)
    await session.until(lambda: a.received(Failed))
    assert a.received(Failed)[0].blame == a.id
    await session.close(b)
    await until_empty(mesh)


@pytest.mark.parametrize("torn", [1, -1])
async def test_a_torn_frame_ends_the_stages_that_it_is_for(mesh: StageMesh, torn: int) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((a, "0-2"), (b, "2-4"))
    session.send_step(1, bytes(512), start=0, tokens=1, kind=StepKind.PREFILL, committed=1, size=512 + torn)
    await session.until(lambda: a.received(Failed))
    (failed,) = a.received(Failed)
    assert failed.blame == a.id
    assert "torn" in failed.message
