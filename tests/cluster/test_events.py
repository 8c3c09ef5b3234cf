"""The events of real daemons: rows add up to the listings, and what happens is told with its reasons."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshd.tui.feed import Connected, Disconnected, Feed
from meshd.tui.rows import LISTINGS, ClusterRows
from real_daemons.cluster import MODEL, Cluster, make_cluster, wait_for

SPLIT = "a:0-17,b:17-30"
AGES = ("first_seen_s", "last_seen_s", "since_s")


class Reader:
    """Reads a daemon's events in a thread."""

    def __init__(self, api: str) -> None:
        self.rows = ClusterRows()
        self.told: list[dict[str, Any]] = []
        self.connections: list[Connected | Disconnected] = []
        self._feed = Feed(api)
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._task = self._loop.create_task(self._read())
        self._loop.run_until_complete(asyncio.gather(self._task, return_exceptions=True))
        self._loop.close()

    async def _read(self) -> None:
        async for event in self._feed.events():
            if isinstance(event, Connected | Disconnected):
                self.connections.append(event)
                if event == Connected(resumed=False):
                    self.rows.clear()
                continue
            self.rows.apply(event)
            if event["type"] not in ("row", "gone"):
                self.told.append(event)

    def close(self) -> None:
        assert self._task is not None
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.told if event["type"] == kind]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Cluster]:
    for cluster in make_cluster(tmp_path_factory.mktemp("events"), shared_cache):
        cluster.start("a", "b", "c", flags=("--copies", "1"))
        cluster.see_each_other()
        yield cluster


@pytest.fixture
def reader(trio: Cluster) -> Iterator[Reader]:
    reader = Reader(trio["a"].api)
    wait_for(lambda: reader.rows["peers"], "the rows of peers", trio["a"])
    yield reader
    reader.close()


def same_as_listings(trio: Cluster, reader: Reader) -> bool:
    """Whether the rows of the events are those of the listings, apart from figures that change all the time.

    Each peer lists its own sessions and plans, and a reader has those of all peers.
    """
    up = [daemon for daemon in trio.daemons.values() if daemon.process.poll() is None]
    listed = {listing: trio["a"].rows(listing) for listing in LISTINGS}
    for listing in ("sessions", "plans"):
        listed[listing] = [row for daemon in up for row in daemon.rows(listing)]
    return all(_steady(reader.rows[listing]) == _steady(rows) for listing, rows in listed.items())


def _steady(rows: Any) -> list[str]:
    changing = ("capability", "clock_ahead_s", "rtt_s", "hop_s", "bandwidth_bytes_s", "measured_at", "measured_tpot_s", *AGES)
    return sorted(str(sorted((key, str(value)) for key, value in row.items() if key not in changing)) for row in rows)


def chat(tokens: int) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0}
    return body | {"max_tokens": tokens, "ignore_eos": True, "mesh": {"stages": SPLIT}}


def test_an_answer_is_told_from_its_plan_to_its_predictions(trio: Cluster, reader: Reader) -> None:
    _, _, headers = trio["a"].post_raw("/v1/chat/completions", chat(40))
    session = headers["x-meshd-session"]
    wait_for(lambda: len(reader.of("prediction")) == 2, "the answer's predictions", trio["a"])
    states = [event["state"] for event in reader.of("session") if event["session"] == session]
    assert states == ["opening", "prefilling", "decoding", "finished"]
    (plan,) = (event for event in reader.of("plan") if event["session"] == session)
    assert (plan["plan"], plan["name"], plan["reason"]) == (SPLIT, "a", "")
    assert plan["predicted_tpot_s"] > 0
    assert {event["what"]: event["session"] for event in reader.of("prediction")} == {"ttft": session, "tpot": session}
    for name in ("a", "b"):
        holding = [event["state"] for event in reader.of("holding") if event["name"] == name]
        assert holding == ["loading", "warm", "active"]
    assert {event["name"] for event in reader.of("load")} == {"a", "b"}
    wait_for(lambda: same_as_listings(trio, reader), "the rows to be those of the listings", trio["a"])


def test_a_lost_peer_is_told_with_the_recovery(trio: Cluster, reader: Reader) -> None:
    asking = threading.Thread(target=trio["a"].post, args=("/v1/chat/completions", chat(80)))
    asking.start()
    wait_for(lambda: any(row["state"] == "decoding" for row in reader.rows["sessions"]), "the answer to run", trio["a"])
    trio["b"].kill()
    asking.join(60)
    (continued,) = reader.of("recovery")
    assert (continued["cause"], continued["method"]) in {("loss", "replay"), ("loss", "prefill")}
    assert continued["pause_s"] > 0
    assert "b" in continued["reason"]
    states = [(event["was"], event["state"]) for event in reader.of("peer") if event["of_name"] == "b"]
    assert ("alive", "dead") in states
    assert len(reader.of("plan")) == 2
    lines = [event for event in reader.of("log") if event["session"] == continued["session"]]
    assert any("continues" in event["text"] and event["level"] == "info" for event in lines)
    wait_for(lambda: same_as_listings(trio, reader), "the rows to be those of the listings", trio["a"])


def test_a_reader_resumes_where_it_was_and_finds_a_daemon_again(trio: Cluster, reader: Reader) -> None:
    api = trio["a"].api.removeprefix("http://")
    trio["a"].kill()
    wait_for(lambda: isinstance(reader.connections[-1], Disconnected), "the reader to notice", trio["c"])
    trio.start("a", flags=("--copies", "1", "--api", api))
    wait_for(lambda: isinstance(reader.connections[-1], Connected), "the reader to find the daemon again", trio["a"])
    wait_for(lambda: same_as_listings(trio, reader), "the rows to be those of the new daemon", trio["a"])
