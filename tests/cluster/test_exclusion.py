"""Real daemons whose cluster key is rotated: a device is excluded in mid-answer, and no identity of it is let in again."""

import base64
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from meshd.protocol.cluster_key import ClusterKey
from meshd.protocol.identity import load_trust
from meshd.protocol.owner import OwnerKey
from meshd.protocol.trust import RotationChain, sign_rotation
from meshd.state import StateFolder
from real_daemons.cluster import MODEL, Cluster, Daemon, wait_for

pytestmark = pytest.mark.timeout(400)

PROMPT = "The lighthouse keeper and her cat went down to the sea"
LATER_S = 3.0
"""How long the excluded devices try in vain. They dial at once, and after a refusal twice a minute."""


def key_command(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `meshd key` on a daemon's device."""
    command = [sys.executable, "-P", "-m", "meshd", "key", *words, "--state", str(daemon.state)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def rotate(daemon: Daemon, *words: str) -> dict[str, Any]:
    """Run `meshd key rotate` or `revoke`. Returns: its JSON document."""
    done = key_command(daemon, *words, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def generation(daemon: Daemon) -> int:
    number: int = daemon.get("/mesh/v1/key")["generation"]
    return number


def names(rows: list[dict[str, Any]]) -> set[str]:
    return {row["name"] for row in rows}


def complete(daemon: Daemon, tokens: int, **options: object) -> tuple[int, Any]:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "mesh": options}
    status, document, headers = daemon.post_raw("/v1/completions", body)
    return status, document | {"session": headers.get("x-meshd-session", "")}


def text(answer: tuple[int, Any]) -> str:
    assert answer[0] == 200, answer[1]
    found: str = answer[1]["choices"][0]["text"]
    return found


def test_a_device_is_excluded_in_mid_answer_and_no_identity_of_it_is_let_in_again(cluster: Cluster) -> None:
    cluster.start("a", "b", "x", "minted1")
    cluster.see_each_other()
    cluster.place("a", stages="x:0-14,b:14-30", context=512)
    cluster.place("a", stages="a:0-30", context=512)
    a, b, x = cluster["a"], cluster["b"], cluster["x"]
    undisturbed = text(complete(a, 120, stages="x:0-14,b:14-30"))
    old_code = cluster.key(a)

    answers: list[tuple[int, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(complete(a, 120, stages="x:0-14,b:14-30")))
    thread.start()
    wait_for(lambda: any(row["id"] for row in x.rows("sessions")), "x to compute", x)
    result = rotate(a, "revoke", "x", "minted1")
    thread.join(60)
    assert text(answers[0]) == undisturbed, "the answer went on with the same tokens"
    story = a.get(f"/mesh/v1/sessions/{answers[0][1]['session']}/story")["data"]
    assert [line["what"] for line in story].count("goes on") == 1, "it was in the middle of the answer"
    assert names(result["taken"]) == {"b"}
    assert names(result["excluded"]) == {"x", "minted1"}
    assert cluster.alive(a) == cluster.alive(b) == {"a", "b"}

    for daemon in (x, cluster["minted1"]):
        wait_for(
            lambda daemon=daemon: "was excluded" in json.dumps(daemon.get("/mesh/v1/self")["notices"]), "it to be told", daemon
        )
        assert daemon.get("/mesh/v1/key")["excluded_at"]
    attack(cluster, old_code)
    assert cluster.alive(a) == cluster.alive(b) == {"a", "b"}
    assert generation(a) == generation(b) == 1
    # Not those of x, which has another port now: the last dial of the earlier port may fail after x was refused.
    reasons = {row["name"]: row["reason"] for row in a.rows("peers")}
    assert "it was excluded from the cluster" in reasons["minted1"]
    assert undisturbed.startswith(text(complete(a, 40, stages="a:0-30")))


def attack(cluster: Cluster, old_code: str) -> None:
    """Try to link again: as before, after a restart, with further identities, and by a rotation of one's own."""
    a, x = cluster["a"], cluster["x"]
    done = key_command(x, "rotate", "--yes")
    assert done.returncode != 0
    assert "does not have the owner key" in done.stderr
    for daemon in (x, a):
        status, document, _ = daemon.post_raw("/mesh/v1/key", forged_rotation(x))
        assert (status, "not signed by the cluster's owner" in document["error"]["message"]) == (400, True), document
    x.kill()
    del cluster.daemons["x"]
    cluster.start("x", flags=("--key", old_code))
    assert cluster["x"].get("/mesh/v1/key")["excluded_at"], "it knows that also after a restart"
    cluster.start("minted2", "minted3", flags=("--key", old_code))
    for daemon in (cluster["minted2"], cluster["minted3"]):
        wait_for(lambda daemon=daemon: daemon.get("/mesh/v1/key")["excluded_at"], "it to be told", daemon)
    time.sleep(LATER_S)


def forged_rotation(x: Daemon) -> dict[str, str]:
    """Sign a rotation with a key that is not the owner's."""
    stored = load_trust(StateFolder(x.state))
    assert stored is not None
    key = ClusterKey(b"k" * 32, stored[0].owner, 1)
    me = x.get("/mesh/v1/self")["id"]
    thief = OwnerKey.from_seed(b"t" * 32)
    record = sign_rotation(thief, generation=1, authority=key.issuer.public, peers=[me], at=int(time.time()))
    return {"rotation": base64.b64encode(RotationChain(key.owner, (record,)).encode()).decode(), "key": key.secret.hex()}


def test_two_rotations_under_a_constant_stream_fail_no_request_and_a_peer_that_was_off_returns(cluster: Cluster) -> None:
    cluster.start("a", "b", "c", "off")
    cluster.see_each_other()
    cluster.place("a", stages="b:0-14,c:14-30", context=512)
    a, b, c = cluster["a"], cluster["b"], cluster["c"]
    expected = text(complete(a, 8, stages="b:0-14,c:14-30"))
    cluster["off"].kill()

    answers: list[tuple[int, Any]] = []
    stop = threading.Event()
    streams = [threading.Thread(target=_ask_until, args=(a, stop, answers)) for _ in range(2)]
    for stream in streams:
        stream.start()
    result: dict[str, Any] = {}
    for number in (1, 2):
        before = len(answers)
        result = rotate(a, "rotate")
        wait_for(lambda before=before: len(answers) >= before + 4, "requests after the rotation", a)
        assert [generation(daemon) for daemon in (a, b, c)] == [number] * 3
    stop.set()
    for stream in streams:
        stream.join(60)
    assert {status for status, _ in answers} == {200}
    assert {text(answer) for answer in answers} == {expected}
    ended = [line for line in a.log.read_text().splitlines() if re.search(r"the link with \w+ (is down|has ended)", line)]
    stayed = [daemon.get("/mesh/v1/self")["id"][:8] for daemon in (b, c)]
    assert not [line for line in ended if any(peer in line for peer in stayed)], "no link of those that stay broke"
    assert (names(result["taken"]), names(result["away"])) == ({"b", "c"}, {"off"})

    del cluster.daemons["off"]
    cluster.start("off")
    cluster.see_each_other()
    assert generation(cluster["off"]) == 2


def _ask_until(daemon: Daemon, stop: threading.Event, answers: list[tuple[int, Any]]) -> None:
    while not stop.is_set():
        answers.append(complete(daemon, 8, stages="b:0-14,c:14-30"))


def test_a_copied_owner_key_excludes_too_and_a_new_join_code_lets_in(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start("a", "b", "x")
    cluster.see_each_other()
    a, b = cluster["a"], cluster["b"]
    assert "does not have the owner key" in key_command(b, "rotate", "--yes").stderr
    assert json.loads(key_command(a, "owner", "add", "b", "--json").stdout)["name"] == "b"
    result = rotate(b, "revoke", "x")
    assert names(result["taken"]) == {"a"}
    assert cluster.key(a) == cluster.key(b) == result["code"]
    assert key_command(cluster["x"], "join", result["code"], "--replace").returncode == 0
    cluster["x"].stop()
    del cluster.daemons["x"]
    cluster._key = result["code"]
    cluster.start("x")
    cluster.see_each_other()
    assert cluster["x"].get("/mesh/v1/key")["excluded_at"] is None
    # The device that has a copy of the owner key is excluded: the owner key is replaced with the cluster key.
    rotate(a, "revoke", "b")
    wait_for(lambda: generation(cluster["x"]) == 2, "x to have the key", cluster["x"])
    rotate(b, "rotate")  # with the old owner key: for itself only
    rotate(b, "rotate")
    time.sleep(LATER_S)
    assert generation(b) == 3
    assert generation(a) == generation(cluster["x"]) == 2
    assert cluster.alive(a) == {"a", "x"}
    assert cluster.alive(b) == {"b"}
    rotate(a, "rotate")
    wait_for(lambda: generation(cluster["x"]) == 3, "x to have the key of the new owner", cluster["x"])


def test_nobody_is_excluded_without_an_answer(cluster: Cluster) -> None:
    cluster.start("a")
    done = key_command(cluster["a"], "rotate")
    assert done.returncode == 2
    assert "add --yes" in done.stderr
    status, _, _ = cluster["a"].post_raw("/mesh/v1/key", {"rotation": "", "key": "00" * 32})
    assert status == 400
    assert generation(cluster["a"]) == 0
    assert key_command(cluster["a"], "api", "add", "phone").returncode == 0
    assert rotate(cluster["a"], "rotate")["generation"] == 1, "this user's commands need no API key"
