"""API keys of a real daemon: they are made, used and revoked while it runs."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

from real_daemons.cluster import MODEL, Cluster, Daemon

ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "Count to a thousand."}], "stream": True, "ignore_eos": True}


def meshd(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "meshd", *words, "--state", str(daemon.state)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def ask(daemon: Daemon, path: str, key: str = "", body: dict[str, Any] | None = None) -> Any:
    headers = {"content-type": "application/json", "x-api-key": key}
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(daemon.api + path, data, headers), timeout=60)


def status(daemon: Daemon, path: str, key: str = "") -> int:
    try:
        with ask(daemon, path, key) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_keys_of_a_running_daemon_are_made_used_and_revoked_in_mid_stream(cluster: Cluster) -> None:
    cluster.start("a", flags=("--log-level", "debug"))
    a = cluster["a"]
    cluster.place("a", context=512)
    assert status(a, "/v1/models") == 200  # open to this machine as long as there is no key
    phone = meshd(a, "key", "api", "add", "phone").stdout.strip()
    watcher = meshd(a, "key", "api", "add", "watcher", "--scope", "read").stdout.strip()
    assert status(a, "/v1/models") == 401
    assert (status(a, "/v1/models", phone), status(a, "/mesh/v1/peers", phone)) == (200, 403)
    assert (status(a, "/v1/models", watcher), status(a, "/mesh/v1/peers", watcher)) == (403, 200)
    assert meshd(a, "status").returncode == 0  # the owner's own commands need no key

    with ask(a, "/v1/chat/completions", phone, ASKED) as stream:
        while not stream.readline().startswith(b"data:"):
            pass
        assert meshd(a, "key", "api", "rm", "phone").returncode == 0
        lines = [line for line in stream.read().decode().splitlines() if line.startswith("data: ")]
    error = json.loads(lines[-1][6:])["error"]
    assert error["code"] == "invalid_api_key"
    assert status(a, "/v1/models", phone) == 401
    assert a.stop() == 0
    log = a.log.read_text()
    assert f"api_key={phone.rpartition('-')[0]}" in log
    assert phone.rpartition("-")[2] not in log
    assert json.loads(meshd(a, "key", "api", "list", "--json").stdout)["data"][0]["last_used"] is not None
