"""One peer, two peers, and five peers with uneven stages give the same tokens and logprobs, to the last bit."""

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
def five(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Cluster]:
    for cluster in make_cluster(tmp_path_factory.mktemp(request.param), shared_cache):
        cluster.start("a", "b", "c", "d", "e", flags=("--backend", request.param))
        cluster.see_each_other()
        for stages in SPLITS.values():
            cluster.place("a", stages=stages, context=1024)
        yield cluster


def answer(cluster: Cluster, at: str, split: str, prompt: str, tokens: int, **sampling: float) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "logprobs": 2,
        "ignore_eos": True,
        "mesh": {"stages": SPLITS[split], "context": 1024},
        **sampling,
    }
    status, document, headers = cluster[at].post_raw("/v1/completions", body)
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
            alone = answer(cluster, "a", "one", prompt, tokens, **sampling)
            assert answer(cluster, "b", "two", prompt, tokens, **sampling) == alone, (prompt, sampling)
            assert answer(cluster, "c", "five", prompt, tokens, **sampling) == alone, (prompt, sampling)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(len(prompts))))


@pytest.mark.timeout(300)  # for a hang only: on a busy machine, the torch backend once took over 120 s
def test_short_answers_are_the_same_on_one_two_and_five_peers(five: Cluster) -> None:
    check_same(five, (PROMPTS[1], LONG), tokens=16)


def test_penalties_are_the_same_on_one_two_and_five_peers(five: Cluster) -> None:
    sampling = {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.8, "presence_penalty": 0.4, "repetition_penalty": 1.2}
    alone = answer(five, "a", "one", PROMPTS[1], 24, **sampling)
    assert answer(five, "d", "five", PROMPTS[1], 24, **sampling) == alone


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_twenty_prompts_of_128_tokens_are_the_same_on_one_two_and_five_peers(five: Cluster) -> None:
    check_same(five, PROMPTS, tokens=128)
