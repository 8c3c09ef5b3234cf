"""What is placed is placed again after the daemons were killed and started anew, until it is unplaced."""

import pytest

from real_daemons.cluster import MODEL, Cluster, Daemon, wait_for

pytestmark = pytest.mark.timeout(300)  # two daemons, each started three times

SPLIT = "a:0-12,b:12-30"


def held(daemon: Daemon) -> dict[str, str]:
    """Return the layers that each peer holds and serves, as this daemon knows them."""
    rows = {row["name"]: row for row in daemon.rows("models")}
    holdings = rows[MODEL]["holdings"] if MODEL in rows else []
    return {holding["name"]: holding["layers"] for holding in holdings if holding["state"] == "active"}


def restart(cluster: Cluster, *names: str) -> None:
    """Start killed daemons again, in the order of their names, at their former state folders."""
    for name in names:
        del cluster.daemons[name]
    cluster.start(*names)


def test_a_placed_model_is_placed_again_after_all_peers_were_killed_and_unplacing_ends_that(cluster: Cluster) -> None:
    cluster.start("a", "b")
    cluster.see_each_other()
    cluster.place("a", stages=SPLIT, context=128)
    for daemon in cluster.daemons.values():
        daemon.kill()
    restart(cluster, "a", "b")
    cluster.see_each_other()
    a, b = cluster["a"], cluster["b"]
    wait_for(lambda: held(a) == {"a": "0-12", "b": "12-30"}, "the model to be placed again", a)
    assert MODEL in [row["id"] for row in a.get("/v1/models")["data"]]

    b.kill()
    wait_for(lambda: "b" not in cluster.alive(a), "a to notice that b is gone", a)
    a.post("/mesh/v1/unplace", {"model": MODEL})
    restart(cluster, "b")
    cluster.see_each_other()
    b = cluster["b"]
    record = b.state / "placements.json"
    wait_for(lambda: '"placed": []' in record.read_text(), "b to be told that the model was unplaced", b)
    wait_for(lambda: held(a) == held(b) == {}, "the unplaced model to be unloaded", b)


def whole(daemon: Daemon) -> bool:
    """Whether every layer of the model is served by some peer, as this daemon knows."""
    served: set[int] = set()
    for layers in held(daemon).values():
        first, end = map(int, layers.split("-"))
        served |= set(range(first, end))
    return served == set(range(30))


def test_a_placed_model_stays_whole_while_its_peers_are_restarted_in_turn(cluster: Cluster) -> None:
    cluster.start("a", "b", "c")
    cluster.see_each_other()
    cluster.place("a", stages=SPLIT, context=128)
    for name in ("b", "c", "a"):
        link, api = cluster[name].link, cluster[name].api
        assert cluster[name].stop() == 0
        first = next(iter(cluster.daemons))
        del cluster.daemons[name]
        cluster.start(name, flags=("--link", link, "--api", api.removeprefix("http://")))
        if name == first:
            cluster.daemons = {name: cluster.daemons.pop(name), **cluster.daemons}
        cluster.see_each_other()
        for each in cluster.daemons.values():
            wait_for(lambda each=each: whole(each), f"{each.name} to know the whole model after {name}'s restart", each)
