"""One peer, two peers, and five peers with uneven stages give the same tokens and logprobs, to the last bit.

The torch backend, which is slower, does so on one and two: `tests/kernels` cuts its layers in more ways.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from real_daemons.cluster import MODEL, Cluster, make_cluster

SPLITS = {
    "one": "a:0-30",
    "two": "b:0-13,a:13-30",
    "five": "c:0-3,a:3-14,e:14-15,b:15-24,d:24-30",
}
ENTRIES = {"one": "a", "two": "b", "five": "c"}
"""The peer that gets the requests. It need not be that of the first stage."""
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox",
    "¿Cuál es la capital de España?",
    "List three primary colours:\n1.",
    "Q: Who wrote Hamlet?\nA:",
    "The mitochondria is the",
    "import numpy as np\n\n",
    "In 1969, Neil Armstrong",
    "Roses are red,",
    "日本の首都は",
    "A recipe for pancakes: first,",
    "The difference between TCP and UDP is that",
    "SELECT name FROM users WHERE",
    "My favourite season is autumn, because",
    "To be, or not to be,",
)
LONG = "The history of the lighthouse, told by those who kept it. " * 20
"""A prompt of about 270 tokens, which is several prefill chunks."""


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def peers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Cluster]:
    names = "abcde" if request.param == "onnxruntime" else "ab"
    for cluster in make_cluster(tmp_path_factory.mktemp(request.param), shared_cache):
        cluster.start(*names, flags=("--backend", request.param))
        cluster.see_each_other()
        for split in splits_over(cluster):
            cluster.place("a", stages=SPLITS[split], context=1024)
        yield cluster


def splits_over(cluster: Cluster) -> list[str]:
    return [split for split, stages in SPLITS.items() if {stage[0] for stage in stages.split(",")} <= set(cluster.daemons)]


def is_slow(cluster: Cluster) -> bool:
    """Whether this is the cluster of the torch backend, which makes 7 to 9 tokens a second."""
    return "five" not in splits_over(cluster)


def answer(cluster: Cluster, split: str, prompt: str, tokens: int, **sampling: float) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "logprobs": 2,
        "ignore_eos": True,
        "mesh": {"stages": SPLITS[split], "context": 1024},
        **sampling,
    }
    status, document, headers = cluster[ENTRIES[split]].post_raw("/v1/completions", body)
    assert status == 200, document
    assert headers["x-meshd-plan"] == SPLITS[split]
    choice: dict[str, Any] = document["choices"][0]
    assert document["usage"]["completion_tokens"] == tokens
    return {key: choice[key] for key in ("text", "finish_reason", "logprobs")}


def check_same(cluster: Cluster, prompts: tuple[str, ...], tokens: int) -> None:
    """Check that all splits give the same answers. Two prompts run at a time, so that their steps alternate on every stage."""

    def one(number: int) -> None:
        prompt = prompts[number]
        for sampling in ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95, "seed": 1000 + number}):
            alone, *others = (answer(cluster, split, prompt, tokens, **sampling) for split in splits_over(cluster))
            assert others
            assert all(other == alone for other in others), (prompt, sampling)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(len(prompts))))


@pytest.mark.timeout(300)  # for a hang only: on a busy machine, the torch backend once took over 120 s
def test_short_answers_are_the_same_however_many_peers_split_the_model(peers: Cluster) -> None:
    if is_slow(peers):
        check_same(peers, PROMPTS[1:2], tokens=8)
    else:
        check_same(peers, (PROMPTS[1], LONG), tokens=16)


def test_penalties_are_the_same_however_many_peers_split_the_model(peers: Cluster) -> None:
    sampling = {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.8, "presence_penalty": 0.4, "repetition_penalty": 1.2}
    alone, *_, last = (answer(peers, split, PROMPTS[1], 8 if is_slow(peers) else 24, **sampling) for split in splits_over(peers))
    assert last == alone


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_twenty_prompts_of_128_tokens_are_the_same_however_many_peers_split_the_model(peers: Cluster) -> None:
    check_same(peers, PROMPTS, tokens=128)
