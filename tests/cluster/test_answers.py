"""Answers of a split model: text, errors, limits, clients that disconnect, peers that die."""

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from real_daemons.cluster import MODEL, Cluster, Daemon, make_cluster, wait_for

SPLIT = "a:0-17,b:17-30"
QUESTION, FACT = "What is 2 + 2? Answer with a number.", "4"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Cluster]:
    for cluster in make_cluster(tmp_path_factory.mktemp("pair"), shared_cache):
        cluster.start("a", "b", flags=("--max-sessions", "2", "--queue-limit", "1"))
        cluster.see_each_other()
        yield cluster


def chat(text: str, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16}
    return body | {"mesh": {"stages": SPLIT}} | fields


class Stream:
    """An event stream whose connection a test can close at any time, as a client that crashes does."""

    def __init__(self, daemon: Daemon, body: dict[str, Any]) -> None:
        self.connection = http.client.HTTPConnection(daemon.api.removeprefix("http://"), timeout=60)
        headers = {"content-type": "application/json"}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": True}), headers)
        self.response = self.connection.getresponse()
        assert self.response.status == 200, self.response.read()

    def events(self) -> Iterator[dict[str, Any]]:
        for line in self.response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
            elif line.startswith(b"data: [DONE]"):
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def kv_tokens_held(daemon: Daemon) -> int:
    """Return the sum of KV tokens that are reserved on all peers, from their adverts."""
    holdings = [holding for row in daemon.rows("peers") for holding in row["holdings"]]
    return sum(holding["kv_tokens_total"] - holding["kv_tokens_free"] for holding in holdings)


def test_a_split_model_answers_and_reports_its_plan(pair: Cluster) -> None:
    status, document, headers = pair["a"].post_raw("/v1/chat/completions", chat(QUESTION))
    assert status == 200
    assert FACT in document["choices"][0]["message"]["content"]
    assert headers["x-meshd-plan"] == SPLIT
    assert float(headers["x-meshd-predicted-tpot-ms"]) > 0
    assert float(headers["x-meshd-predicted-ttft-ms"]) > 0
    assert headers["x-meshd-session"]


def test_another_peer_finds_the_split_by_itself_and_answers_the_same(pair: Cluster) -> None:
    body = chat(QUESTION)
    first = pair["a"].post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    del body["mesh"]
    assert pair["b"].post("/v1/chat/completions", body)["choices"][0]["message"]["content"] == first


def test_a_streamed_answer_has_the_same_text_as_a_whole_one(pair: Cluster) -> None:
    body = chat("Write one sentence about tea. Use an emoji.", max_tokens=40)
    whole = pair["a"].post("/v1/chat/completions", body)["choices"][0]
    with Stream(pair["a"], body) as stream:
        chunks = [choice for event in stream.events() for choice in event["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in chunks) == whole["message"]["content"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]


def test_the_same_seed_gives_the_same_answer_and_another_seed_a_different_one(pair: Cluster) -> None:
    def text(seed: int) -> str:
        body = chat("Tell me a story.", temperature=1.2, seed=seed, max_tokens=24)
        content: str = pair["a"].post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
        return content

    assert text(7) == text(7)
    assert text(7) != text(8)


def test_a_stop_string_ends_the_answer_before_it_and_frees_the_stages(pair: Cluster) -> None:
    text = pair["a"].post("/v1/chat/completions", chat("Count from one to ten.", max_tokens=40))["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    choice = pair["a"].post("/v1/chat/completions", chat("Count from one to ten.", max_tokens=40, stop=[stop]))["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == text[: text.index(stop)]
    wait_for(lambda: not pair["b"].rows("sessions"), "the stages to end", pair["b"], within_s=5)


def test_a_prompt_of_several_chunks_is_answered(pair: Cluster) -> None:
    body = chat("Repeat the last word. " + "one two three four five six seven eight nine ten " * 60)
    usage = pair["a"].post("/v1/chat/completions", body)["usage"]
    assert usage["prompt_tokens"] > 2 * 128


def test_a_request_over_the_context_length_is_a_400(pair: Cluster) -> None:
    status, document, _ = pair["a"].post_raw("/v1/chat/completions", chat("hello", max_tokens=100_000))
    assert status == 400
    assert document["error"]["code"] == "context_length_exceeded"


def test_an_unknown_model_is_a_404(pair: Cluster) -> None:
    status, document, _ = pair["a"].post_raw("/v1/chat/completions", chat("hello", model="smollm2:136m"))
    assert status == 404
    assert document["error"]["code"] == "model_not_found"
    assert MODEL in document["error"]["message"]


@pytest.mark.parametrize(
    ("stages", "reason"),
    [("a:0-17", "17-30"), ("a:0-17,b:16-30", "overlap"), ("nobody:0-30", "nobody"), ("a:0-40", "out of range")],
)
def test_impossible_stages_are_refused_with_the_reason(pair: Cluster, stages: str, reason: str) -> None:
    status, document, _ = pair["a"].post_raw("/v1/chat/completions", chat("hello", mesh={"stages": stages}))
    assert status in (400, 503)
    assert reason in document["error"]["message"]


def test_the_kv_of_a_client_that_disconnects_is_freed(pair: Cluster) -> None:
    stream = Stream(pair["a"], chat("Tell me a very long story.", max_tokens=1500, ignore_eos=True))
    events = stream.events()
    for _ in range(3):
        next(events)
    wait_for(lambda: kv_tokens_held(pair["a"]) > 2 * 1500, "KV to be reserved on both peers", pair["a"], within_s=5)
    stream.close()
    for daemon in pair.daemons.values():
        wait_for(lambda daemon=daemon: not daemon.rows("sessions"), "all sessions to end", daemon, within_s=2)
    wait_for(lambda: kv_tokens_held(pair["a"]) == 0, "all KV to be free", pair["a"], within_s=2)


def test_a_full_queue_is_a_429_with_retry_after(pair: Cluster) -> None:
    """Two answers may run and one request may wait. With two running, two of three new requests are refused at once."""
    body = chat("Tell me a very long story.", max_tokens=1500, ignore_eos=True)
    replies: list[tuple[int, Any, dict[str, str]]] = []

    def ask() -> None:
        replies.append(pair["a"].post_raw("/v1/chat/completions", chat("hi")))

    asking = [threading.Thread(target=ask) for _ in range(3)]
    with Stream(pair["a"], body), Stream(pair["a"], body):
        for thread in asking:
            thread.start()
        wait_for(lambda: len(replies) == 2, "two refusals", pair["a"], within_s=20)
        for status, document, headers in replies:
            assert status == 429
            assert int(headers["retry-after"]) >= 1
            assert document["error"]["code"] == "overloaded"
    for thread in asking:
        thread.join()
    assert replies[2][0] == 200


def test_a_stream_that_waits_in_the_queue_gets_its_headers_and_comments_before_its_turn(pair: Cluster) -> None:
    long = chat("Tell me a very long story.", max_tokens=1500, ignore_eos=True)
    with Stream(pair["a"], long), Stream(pair["a"], long):
        third = Stream(pair["a"], chat("hi", max_tokens=2))
        assert third.response.readline() == b": waiting\n"
    with third:
        assert [event["choices"][0]["finish_reason"] for event in third.events()][-1] == "length"


def test_two_answers_at_once_are_the_same_as_one_after_the_other(pair: Cluster) -> None:
    questions = (QUESTION, "Name three colours.")
    alone = [pair["a"].post("/v1/chat/completions", chat(text))["choices"][0]["message"]["content"] for text in questions]
    together: dict[int, str] = {}

    def ask(number: int) -> None:
        answer = pair["ab"[number]].post("/v1/chat/completions", chat(questions[number]))
        together[number] = answer["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[0], together[1]] == alone


def test_a_request_waits_for_the_kv_that_another_one_uses(cluster: Cluster) -> None:
    cluster.start("a", flags=("--memory", "450MiB"))
    whole = chat("Tell me a very long story.", mesh={"context": 4096}, max_tokens=None, ignore_eos=True)
    with Stream(cluster["a"], whole) as stream:
        next(stream.events())
        replies: list[int] = []

        def ask() -> None:
            replies.append(cluster["a"].post_raw("/v1/chat/completions", whole | {"stop": [" "]})[0])

        waiting = threading.Thread(target=ask)
        waiting.start()
        waiting.join(1.0)
        assert replies == []
    waiting.join(30)
    assert replies == [200]


def test_an_answer_loses_no_token_with_a_peer_whose_layers_no_other_peer_has(cluster: Cluster) -> None:
    cluster.start("a", "b")
    cluster.see_each_other()
    body = chat("Tell me a long story.", max_tokens=120, ignore_eos=True)
    whole = cluster["a"].post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    with Stream(cluster["a"], body) as stream:
        events = stream.events()
        first = [next(events) for _ in range(8)]
        cluster["b"].kill()
        chunks = [choice["delta"].get("content") or "" for event in [*first, *events] for choice in event["choices"]]
    assert "".join(chunks) == whole
    document = cluster["a"].post("/v1/chat/completions", chat(QUESTION, mesh={}))
    assert FACT in document["choices"][0]["message"]["content"]


def test_a_daemon_that_stops_ends_its_streams_with_an_error(cluster: Cluster) -> None:
    cluster.start("a")
    body = chat("Tell me a very long story.", max_tokens=1500, ignore_eos=True, mesh={})
    with Stream(cluster["a"], body) as stream:
        events = stream.events()
        next(events)
        assert cluster["a"].stop() == 0
        assert "error" in list(events)[-1]
