"""Which KV a later epoch takes over, and when the rest is freed."""

from stage_mesh.mesh import StageMesh
from stage_mesh.sessions import ANSWER, driver, expected, until_empty


async def test_two_stages_that_split_an_older_one_share_its_lease(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, b)
    session.credit = 20
    await session.begin((a, "0-3"), (b, "3-4"))
    await session.wait_tokens(20)
    await session.held_back()
    used = a.share.leased_bytes
    session.credit = 40
    await session.next_epoch((a, "0-2"), (a, "2-3"), (b, "3-4"))
    assert [opened.held for opened in session.opened] == [59, 59, 59]
    assert session.opened[1].kept_to == 59, "the outputs of the older stage that ends at the same layer"
    assert session.opened[0].kept_to == 0
    assert a.share.leased_bytes == used
    await session.wait_tokens(40)
    await session.held_back()
    session.credit = ANSWER
    await session.next_epoch((a, "0-2"), (b, "2-3"), (b, "3-4"))  # the stage of layer 2 moves from a to b
    assert [opened.held for opened in session.opened] == [79, 0, 79]
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(a, b)
    await until_empty(mesh)


async def test_unused_kv_is_freed_at_resume_and_not_before(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, b)
    session.credit = 10
    await session.begin((a, "0-2"), (a, "2-4"))
    await session.wait_tokens(10)
    used = a.share.leased_bytes
    await session.open((a, "0-2"), (b, "2-4"), resume=True)
    assert a.share.leased_bytes == used
    session.resume()
    await session.until(lambda: a.share.leased_bytes == used // 2)
    session.grant(ANSWER)
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)


async def test_an_epoch_that_is_opened_but_never_resumed_loses_no_kv(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 10
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(10)
    await session.held_back()
    await session.open((a, "0-2"), (b, "2-4"), resume=True)
    await session.open((a, "0-1"), (a, "1-2"), (b, "2-4"), resume=True)
    session.credit = ANSWER
    await session.next_epoch((a, "0-2"), (b, "2-4"))
    assert [(opened.held, opened.kept_to) for opened in session.opened] == [(49, 49), (49, 0)]
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(a, b)
    await until_empty(mesh)


async def test_an_open_without_resume_frees_the_kv_of_the_epoch_before(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b", blocks=4)
    session = driver(mesh, a)
    await session.open((b, "0-4"))
    await session.begin((b, "0-4"))  # the share has room for one epoch only
    await session.wait_tokens(ANSWER)


async def test_kept_outputs_that_are_encoded_otherwise_are_not_sent_again(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 10
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(10)
    manager = a.host._kv_manager
    (session_kv,) = manager
    cache = session_kv.caches[0]
    log = cache.log
    assert log is not None
    manager.assign_log(session_kv, cache, "f32")
    assert cache.log is log
    manager.assign_log(session_kv, cache, "another")
    assert cache.log is not None
    assert cache.log.kept_to == 0
    manager.outputs.drop(log)
