import json
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any

import pytest

from fake_api.rows_server import Api
from meshd.cli.status import render

Meshd = Callable[..., CompletedProcess[str]]
RATES = {
    "decode_bytes_s": 8.3e9, "prefill_flops_s": 1.07e11, "memory_bytes_s": 2.7e10,
    "attention_bytes_s": 7e9, "disk_bytes_s": 1.5e9, "layer_overhead_s": 6.4e-5,
}  # fmt: skip
CAPABILITY = {
    "backend": "onnxruntime", "processor": "a processor", "threads": 2, "memory_total_bytes": 8 * 2**30,
    "memory_free_bytes": 3 * 2**29, "rates": RATES, "roles": ["compute"], "power_w": None, "measured_at": 1.0,
}  # fmt: skip


def _holding(layers: str, state: str = "active", progress: float = 1.0) -> dict[str, Any]:
    return {"model": "5ba2" * 8, "layers": layers, "state": state, "progress": progress, "weight_bytes": 1}


def _peer(name: str, state: str = "alive", **other: object) -> dict[str, Any]:
    row = {
        "id": f"{name}aaaaaaaaaaaa", "name": name, "state": state, "reason": "", "sources": ["mdns"], "version": "0.1.0",
        "addresses": ["10.0.0.1:6375"], "trouble": "", "hint": "",
        "incarnation": 1, "capability": CAPABILITY, "holdings": [], "models": [],
        "sessions": 0, "api": "",
    }  # fmt: skip
    return row | other


@pytest.fixture
def status() -> dict[str, Any]:
    """A status with three peers: one ready, one that loads layers, one that is refused."""
    stranger = _peer("10.0.0.9:6375", "refused", id="", capability=None, reason="it holds another cluster's key")
    stranger |= {"trouble": "refused", "hint": "meshd up --key CODE"}
    late = {"trouble": "clock", "reason": "its clock is 24 h behind this device's", "hint": "sudo timedatectl set-ntp true"}
    session = {
        "id": "10d4" * 8,
        "role": "coordinator",
        "model": "smollm2:135m",
        "state": "decoding",
        "tokens": 7,
        "plan": "ash:0-12",
    }
    return {
        "self": {
            "id": "ashaaaaaaaaaaaa", "name": "ash", "version": "0.1.0", "protocol": "1.0", "cluster": "bufmutkhrhy2daic",
            "api": "127.0.0.1:6374", "link": "0.0.0.0:6375", "uptime_s": 75.0, "interfaces": [], "other_clusters": {},
            "notices": [{"message": "this folder was copied", "hint": "remove it"}],
        },
        "peers": [
            _peer("ash", holdings=[_holding("0-12")]),
            _peer("birch", holdings=[_holding("12-30", "loading", 0.4)], **late),
            stranger,
        ],
        "links": [
            {"source": "a", "target": "b", "source_name": "ash", "target_name": "birch", "rtt_s": 2.1e-4, "hop_s": 8.8e-5,
             "bandwidth_bytes_s": 1.18e8, "measured_at": 1.0},
        ],
        "models": [{"id": "5ba2" * 8, "name": "smollm2:135m"}],
        "sessions": [session],
    }  # fmt: skip


def _serve(api: Api, status: dict[str, Any]) -> None:
    api.answer("GET", "/mesh/v1/self", status["self"])
    for name in ("peers", "links", "models", "sessions"):
        api.answer("GET", f"/mesh/v1/{name}", {"object": "list", "data": status[name]})


def test_status_is_one_document(meshd: Meshd, api: Api, status: dict[str, Any]) -> None:
    _serve(api, status)
    assert json.loads(meshd("status", "--json", "--api", api.url).stdout) == status


def test_status_shows_who_holds_what_and_why_a_peer_is_left_out(meshd: Meshd, api: Api, status: dict[str, Any]) -> None:
    _serve(api, status)
    lines = meshd("status", "--api", api.url).stdout.splitlines()
    assert lines[0] == "ash (ashaaaaa), meshd 0.1.0, up 75.0 s"
    assert lines[1] == "cluster bufmutkhrhy2daic: 2 peers alive; API 127.0.0.1:6374, links 0.0.0.0:6375"
    assert lines[2] == "notice: this folder was copied; remove it"
    ash, birch = (next(line for line in lines if line.startswith(name)) for name in ("ash (this)", "birch "))
    for part in ("alive", "onnxruntime x2", "8.3 GB/s", "107 GFLOP/s", "1.5 GiB of 8.0 GiB", "smollm2:135m 0-12"):
        assert part in ash
    assert birch.endswith("smollm2:135m 12-30 (loading 40 %)")
    assert "10.0.0.9:6375: left out (refused): it holds another cluster's key; meshd up --key CODE" in lines
    assert "birch: its clock is 24 h behind this device's; sudo timedatectl set-ntp true" in lines
    assert any(line.startswith("`meshd doctor` checks") for line in lines)
    assert any(line.split() == ["ash", "birch", "210", "us", "88", "us", "118", "MB/s"] for line in lines)
    assert any("decoding" in line and "coordinator" in line for line in lines)


def test_status_shows_draining_peers_standby_layers_and_recoveries(status: dict[str, Any]) -> None:
    held = [_holding("0-12"), _holding("12-20") | {"standby": True}, _holding("20-30", "loading", 0.5) | {"standby": True}]
    status["peers"][1] |= {"draining": True, "holdings": held}
    changes = [("replay", 310.0), ("mirror", 120.0), ("kept", 2.5), ("prefill", 2100.0)]
    status["sessions"][0] |= {
        "recoveries": [{"epoch": 2, "method": method, "pause_ms": pause_ms, "reason": "x"} for method, pause_ms in changes],
        "method": "prefill",
        "mirrors": [{"stage": 1, "peer": "c", "name": "cedar", "held": 96}],
    }
    status["sessions"].append({"id": "2", "role": "stage 1", "model": "m", "state": "active", "tokens": 1, "plan": "0-12"})
    lines = render(status).splitlines()
    birch = next(line for line in lines if line.startswith("birch "))
    assert "alive, draining" in birch
    assert birch.endswith("smollm2:135m 0-12, smollm2:135m 12-20 (standby), smollm2:135m 20-30 (loading 50 %)")
    own, other = lines[-2:]
    assert own.endswith("ash:0-12  stage 1 at cedar  1 more, mirror 120 ms, kept 2.5 ms, prefill 2.1 s")
    assert other.split()[-2:] == ["-", "-"]


def test_a_lone_peer_shows_no_empty_tables(status: dict[str, Any]) -> None:
    text = render({**status, "peers": status["peers"][:1], "links": [], "sessions": []})
    assert "ROUND TRIP" not in text
    assert "SESSION" not in text
    assert "1 peer alive" in text


def test_bench_mesh_measures_the_links_again(meshd: Meshd, api: Api, status: dict[str, Any]) -> None:
    api.answer("POST", "/mesh/v1/links/probe", {"object": "list", "data": status["links"]})
    assert "118 MB/s" in meshd("bench", "--mesh", "--api", api.url).stdout
    api.answer("POST", "/mesh/v1/links/probe", {"object": "list", "data": []})
    assert "no other peer" in meshd("bench", "--mesh", "--api", api.url).stdout
