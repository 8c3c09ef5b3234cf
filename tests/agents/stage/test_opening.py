"""Which OPEN messages are accepted, and what the reply reports."""

import msgspec
import numpy as np
import pytest

from meshd.errors import RemoteFailure
from meshd.numerics import NumericsId
from stage_mesh.mesh import StageMesh
from stage_mesh.sessions import ANSWER, PROMPT, driver, expected, refused, stage_of, until_empty


async def test_penalties_count_the_tokens_of_earlier_epochs(mesh: StageMesh) -> None:
    penalties = {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4}
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a, **penalties)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    mesh.isolate(b)
    session.credit = ANSWER
    await session.next_epoch((a, "0-2"), (c, "2-4"))
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh, **penalties)


async def test_a_past_epoch_and_a_stage_that_failed_are_refused(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.epoch = 4
    await session.open((b, "0-4"))
    session.epoch = 2
    assert "epoch 3 is past" in await refused(session, (b, "0-4"))
    session.epoch = 6
    b.host._runner.fail(stage_of(b), RemoteFailure("a test", remote_code="test"), a.id)
    assert (await session.open_stage(0, resume=True)).held == 0
    b.host._runner.fail(stage_of(b), RemoteFailure("a test", remote_code="test"), a.id)
    with pytest.raises(RemoteFailure, match="has failed in epoch 6"):
        await session.open_stage(0, resume=True)
    await session.close(b)
    await until_empty(mesh)


async def test_a_repeated_open_gets_the_same_answer(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 5
    await session.begin((b, "0-4"))
    await session.wait_tokens(5)
    await session.open((b, "0-4"), resume=True)
    again = await session.open_stage(0, resume=True)
    assert msgspec.structs.replace(again, request=0) == msgspec.structs.replace(session.opened[0], request=0)
    assert again.held == 44
    assert again.blocks == 4


async def test_an_open_without_the_tokens_that_its_sampler_needs_is_refused(mesh: StageMesh) -> None:
    a = mesh.start("a")
    session = driver(mesh, a, repetition_penalty=1.5)
    session.plan, session.epoch = session.plan_of((a, "0-4")), 1
    for payload in (None, bytes(8), np.full(len(PROMPT), 320, "<i4").data.cast("B")):
        with pytest.raises(RemoteFailure, match="token ids"):
            await a.links.request(a.id, session.open_message(0, resume=False), payload, timeout_s=1)
    await until_empty(mesh)


async def test_a_stage_is_refused_under_other_numerics_than_those_of_the_plan(mesh: StageMesh) -> None:
    own, other = NumericsId("torch/f32/512/0123456789abcdef"), NumericsId("torch/f32/512/fedcba9876543210")
    a, b = mesh.start("a"), mesh.start("b")
    b.host.residents.numerics = own
    session = driver(mesh, a)
    session.plan, session.epoch = session.plan_of((b, "0-4")), 1
    session.plan = msgspec.structs.replace(session.plan, numerics=(other,))
    with pytest.raises(RemoteFailure, match="computes with the numerics") as caught:
        await session.open_stage(0, resume=False)
    assert caught.value.remote_code == "no_such_peer"
    await until_empty(mesh)
    session.plan = msgspec.structs.replace(session.plan, numerics=(own,))
    assert (await session.open_stage(0, resume=False)).held == 0
    await session.close(b)
