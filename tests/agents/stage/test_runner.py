"""Which peer a failed stage blames."""

from typing import Any

import msgspec
import numpy as np
import pytest

from meshd.protocol.messages import Activation, Failed, Resume, Token
from stage_mesh.driver import SESSION
from stage_mesh.mesh import StageMesh
from stage_mesh.sessions import driver, sent_tokens, stage_of, until_empty


async def test_hidden_states_that_are_not_finite_are_the_senders_fault(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((a, "0-2"), (b, "2-4"))
    bad = np.full((1, 128), np.nan, np.float32)
    message = Activation(session=SESSION, epoch=1, step=0, stage=1, tokens=1, hidden=128, dtype="f32", sample=False)
    a.links.send(b.id, message, bad.data.cast("B"))
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
        layers, embed = stage.layers, stage.embed

        def forward(self, hidden: Any, *rest: Any) -> Any:
            return stage.forward(hidden, *rest) * np.float32(np.inf)

    stage_of(a).stage = Broken()
    session.send_prompt()
    await session.until(lambda: b.received(Failed))
    assert b.received(Failed)[0].blame == a.id
    assert not sent_tokens(a), "the invalid output is not sent"


@pytest.mark.parametrize(
    ("changes", "payload", "message_part"),
    [({"step": 3}, 512, "came where 0 was due"), ({"tokens": 2}, 512, "torn"), ({"hidden": 64}, 256, "torn")],
)
async def test_an_invalid_step_is_the_senders_fault(
    mesh: StageMesh, changes: dict[str, int], payload: int, message_part: str
) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((a, "0-2"), (b, "2-4"))
    message = Activation(session=SESSION, epoch=1, step=0, stage=1, tokens=1, hidden=128, dtype="f32", sample=False)
    a.links.send(b.id, msgspec.structs.replace(message, **changes), bytes(payload))
    await session.until(lambda: a.received(Failed))
    (failed,) = a.received(Failed)
    assert failed.blame == a.id
    assert message_part in failed.message


@pytest.mark.parametrize("token", [50_000, 2**30])
async def test_a_token_outside_the_vocabulary_is_its_senders_fault(mesh: StageMesh, token: int) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((a, "0-2"), (b, "2-4"))
    b.links.send(a.id, Token(session=SESSION, epoch=1, step=5, index=0, token=token))
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
