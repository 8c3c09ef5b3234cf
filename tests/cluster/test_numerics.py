"""Real daemons, one of which computes with another backend: one numerics for a model if it fits, and a mixture that is named."""

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshd.numerics import is_promised
from real_daemons.cluster import MODEL, Cluster, make_cluster, wait_for

pytestmark = pytest.mark.timeout(400)
"""The first run on a machine measures a second backend, and loads torch."""
PROMPT = "Once upon a time there was a lighthouse keeper"


@pytest.fixture
def small(tmp_path: Path, shared_cache: Path) -> Iterator[Cluster]:
    """a and b with onnxruntime, t with torch; the model takes the memory of two of them."""
    for cluster in make_cluster(tmp_path, shared_cache):
        cluster.start("a", "b", flags=("--memory", "250MiB"))
        cluster.start("t", flags=("--memory", "250MiB", "--backend", "torch"))
        cluster.see_each_other()
        yield cluster


@pytest.fixture
def roomy(tmp_path: Path, shared_cache: Path) -> Iterator[Cluster]:
    """a, b and c with onnxruntime, t with torch; a has the first half of the model, and each of the others the second half."""
    for cluster in make_cluster(tmp_path, shared_cache):
        cluster.start("a", "b", "c")
        cluster.start("t", flags=("--backend", "torch"))
        cluster.see_each_other()
        for peer in ("b", "c", "t"):
            cluster.place("a", stages=f"a:0-15,{peer}:15-30", context=1024)
        yield cluster


def ids(cluster: Cluster) -> dict[str, str]:
    return {row["name"]: row["capability"]["numerics"] for row in cluster["a"].rows("peers")}


def story(cluster: Cluster, session: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = cluster["a"].get(f"/mesh/v1/sessions/{session}/story")["data"]
    return lines


def test_a_model_that_fits_on_one_numerics_uses_only_that_and_a_mixture_is_named(small: Cluster) -> None:
    known, a = ids(small), small["a"]
    assert known["a"] == known["b"] != known["t"]
    assert is_promised(known["a"])  # type: ignore[arg-type]
    plan = a.post("/mesh/v1/plan", {"model": MODEL, "context": 2048})
    assert {stage["name"] for stage in plan["stages"]} == {"a", "b"}
    assert plan["numerics"] == {"ids": [known["a"]] * 2, "mixed": False, "promised": True, "why": plan["numerics"]["why"]}
    small.place("a", context=2048)
    status, _, headers = a.post_raw("/v1/completions", {"model": MODEL, "prompt": PROMPT, "max_tokens": 4})
    assert (status, headers["x-meshd-numerics"]) == (200, known["a"])
    a.post("/mesh/v1/unplace", {"model": MODEL})

    only = {"peers": ["a", "t"]}
    plan = a.post("/mesh/v1/plan", {"model": MODEL, "context": 2048, "mesh": only})
    assert plan["numerics"]["mixed"]
    assert plan["numerics"]["why"] == "no plan on one numerics fits"
    assert any(line.startswith("mixed numerics: ") for line in plan["text"])
    small.place("a", context=2048, stages="a:0-15,t:15-30")
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "mesh": only}
    status, _, headers = a.post_raw("/v1/completions", body)
    assert status == 200
    assert set(headers["x-meshd-numerics"].split(", ")) == {known["a"], known["t"]}
    [planned] = [line for line in story(small, headers["x-meshd-session"]) if line["what"] == "planned"]
    assert planned["numerics"] == headers["x-meshd-numerics"]


def answer_while(cluster: Cluster, lost: str) -> tuple[str, str]:
    """Kill a peer after ten tokens of an answer over a and this peer. Returns: the session, and the answer's text."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 100, "temperature": 0, "stream": True, "ignore_eos": True}
    data = json.dumps(body | {"mesh": {"stages": f"a:0-15,{lost}:15-30"}}).encode()
    request = urllib.request.Request(cluster["a"].api + "/v1/completions", data, {"content-type": "application/json"})
    texts: list[str] = []
    with urllib.request.urlopen(request, timeout=60) as stream:
        session: str = stream.headers["x-meshd-session"]
        for line in stream:
            if line.startswith(b"data: {"):
                texts.append(json.loads(line[6:])["choices"][0]["text"])
                if len(texts) == 10:
                    threading.Thread(target=cluster[lost].kill).start()
    return session, "".join(texts)


def test_a_lost_stage_goes_to_its_own_numerics_and_where_there_is_none_the_story_says_so(roomy: Cluster) -> None:
    known = ids(roomy)
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    undisturbed = roomy["a"].post("/v1/completions", body | {"mesh": {"stages": "a:0-15,b:15-30"}})["choices"][0]["text"]
    session, text = answer_while(roomy, "b")
    planned = [line for line in story(roomy, session) if line["what"] == "planned"]
    assert [line["numerics"] for line in planned] == [known["a"]] * 2
    assert "c:15-30" in planned[1]["plan"]
    assert text == undisturbed
    wait_for(lambda: "b" not in roomy.alive(roomy["a"]), "b to be gone", roomy["a"])

    session, text = answer_while(roomy, "c")
    lines = story(roomy, session)
    planned = [line for line in lines if line["what"] == "planned"]
    assert planned[0]["numerics"] == known["a"]
    assert set(planned[-1]["numerics"].split(", ")) == {known["a"], known["t"]}
    [change] = [line for line in lines if line["what"] == "numerics change"]
    assert (change["layers"], "near-tie" in change["effect"]) == ("15-30", True)
    assert text.startswith(undisturbed[:20])
