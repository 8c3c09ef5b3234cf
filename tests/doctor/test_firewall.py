"""Each firewall is asked with its own command; programs of that name print what the real ones print."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.agents.cluster_service import CheckResult
from meshd.doctor.check import CommandOutput, Context, run_command
from meshd.doctor.firewall import firewall

Install = Callable[..., None]

UFW_CLOSED = """\
Status: active

To                         Action      From
--                         ------      ----
22/tcp                     ALLOW       Anywhere
5353/udp                   ALLOW       Anywhere
"""
FIREWALLD = """\
public (active)
  target: {target}
  interfaces: eth0
  services: dhcpv6-client ssh{services}
  ports: {ports}
  rich rules:
"""
IPTABLES_CLOSED = """\
-P INPUT DROP
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A INPUT -p udp -m udp --dport 5353 -j ACCEPT
"""
SUDO = "sudo meshd doctor"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a program that prints a text and ends with a status, or a different text for each of its last arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def program(name: str, text: str = "", status: int = 0, **answers: str) -> None:
        texts = {key.replace("_", "-"): value for key, value in answers.items()}
        code = f"import sys\nprint({texts!r}.get(sys.argv[-1].lstrip('-'), {text!r}), end='')\nsys.exit({status})\n"
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)

    return program


@pytest.fixture
def ask(context: Context, tmp_path: Path) -> Callable[[], CheckResult]:
    config = replace(context.config, link=replace(context.config.link, port=6375), discovery=("mdns", "static"))

    def run() -> CheckResult:
        [result] = firewall(replace(context, config=config, command=run_command, root=tmp_path))
        return result

    return run


def _said(result: CheckResult) -> tuple[str, str, str]:
    return result.status.value, result.subject, result.mend


def test_no_firewall(ask: Callable[[], CheckResult], install: Install) -> None:
    assert _said(ask()) == ("ok", "", "")


def test_ufw_that_is_closed(ask: Callable[[], CheckResult], install: Install) -> None:
    install("ufw", UFW_CLOSED)
    assert _said(ask()) == ("wrong", "ufw", "sudo ufw allow 6375/tcp")


@pytest.mark.parametrize("to", ["6375/tcp", "6375", "6370:6380/tcp", "Anywhere"])
def test_ufw_that_lets_peers_in(to: str, ask: Callable[[], CheckResult], install: Install) -> None:
    install("ufw", f"{UFW_CLOSED}{to:<26} ALLOW       192.168.1.0/24\n")
    assert _said(ask()) == ("ok", "ufw", "")


@pytest.mark.parametrize(
    "rule", ["6375/tcp                   ALLOW OUT   Anywhere", "6375/udp                   ALLOW       Anywhere"]
)
def test_ufw_with_a_rule_that_does_not_help(rule: str, ask: Callable[[], CheckResult], install: Install) -> None:
    install("ufw", f"{UFW_CLOSED}{rule}\n")
    assert ask().status.value == "wrong"


def test_ufw_that_is_inactive_leaves_the_question_to_the_rules_below(ask: Callable[[], CheckResult], install: Install) -> None:
    install("ufw", "Status: inactive\n")
    install("iptables", IPTABLES_CLOSED)
    assert ask().subject == "iptables"


def test_ufw_that_only_root_may_ask(ask: Callable[[], CheckResult], install: Install, tmp_path: Path) -> None:
    install("ufw", "ERROR: You need to be root to run this script\n", 1)
    (tmp_path / "etc/ufw").mkdir(parents=True)
    (tmp_path / "etc/ufw/ufw.conf").write_text("ENABLED=yes\nLOGLEVEL=low\n")
    assert _said(ask()) == ("unchecked", "ufw", SUDO)


def test_firewalld_that_is_closed(ask: Callable[[], CheckResult], install: Install) -> None:
    install("firewall-cmd", state="running\n", list_all=FIREWALLD.format(target="default", services="", ports=""))
    mend = "sudo firewall-cmd --permanent --add-port=6375/tcp --add-service=mdns && sudo firewall-cmd --reload"
    assert _said(ask()) == ("wrong", "firewalld", mend)


@pytest.mark.parametrize(
    ("target", "services", "ports"),
    [("default", " mdns", "6370-6380/tcp"), ("ACCEPT", "", ""), ("default", "", "6375/tcp 5353/udp")],
)
def test_firewalld_that_lets_peers_in(
    target: str, services: str, ports: str, ask: Callable[[], CheckResult], install: Install
) -> None:
    install("firewall-cmd", state="running\n", list_all=FIREWALLD.format(target=target, services=services, ports=ports))
    assert _said(ask()) == ("ok", "firewalld", "")


def test_firewalld_that_does_not_run(ask: Callable[[], CheckResult], install: Install) -> None:
    install("firewall-cmd", "not running\n", 252)
    assert ask().status.value == "ok"


def _nft(policy: str, *rules: list[object]) -> str:
    where = {"family": "inet", "table": "filter"}
    chain = {"chain": {**where, "name": "input", "type": "filter", "hook": "input", "prio": 0, "policy": policy}}
    return json.dumps(
        {"nftables": [{"metainfo": {}}, chain, *({"rule": {**where, "chain": "input", "expr": rule}} for rule in rules)]}
    )


def _port(protocol: str, right: object, verdict: str, op: str = "==") -> list[object]:
    left = {"payload": {"protocol": protocol, "field": "dport"}}
    return [{"match": {"op": op, "left": left, "right": right}}, {verdict: None}]


def test_nftables_that_drops_by_default(ask: Callable[[], CheckResult], install: Install) -> None:
    related = [{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established"]}}, {"accept": None}]
    install("nft", _nft("drop", related, _port("tcp", {"set": [22, 80]}, "accept"), _port("udp", 5353, "accept")))
    assert _said(ask()) == ("wrong", "nftables", "sudo nft insert rule inet filter input tcp dport 6375 accept")


def test_nftables_that_drops_one_port(ask: Callable[[], CheckResult], install: Install) -> None:
    install("nft", _nft("accept", _port("udp", {"range": [5000, 6000]}, "drop")))
    assert _said(ask()) == ("wrong", "nftables", "sudo nft insert rule inet filter input udp dport 5353 accept")


def test_nftables_that_lets_peers_in(ask: Callable[[], CheckResult], install: Install) -> None:
    install("nft", _nft("drop", _port("tcp", {"set": [22, {"range": [6000, 7000]}]}, "accept"), _port("udp", 5353, "accept")))
    assert _said(ask()) == ("ok", "nftables", "")


@pytest.mark.parametrize(
    "rule",
    [
        [{"jump": {"target": "filter_INPUT"}}],
        _port("tcp", "@open_ports", "accept"),
        [{"vmap": {"key": {"payload": {"protocol": "tcp", "field": "dport"}}, "data": {"set": []}}}],
    ],
)
@pytest.mark.parametrize("policy", ["drop", "accept"])
def test_nftables_whose_rules_lead_elsewhere(
    policy: str, rule: list[object], ask: Callable[[], CheckResult], install: Install
) -> None:
    install("nft", _nft(policy, rule))
    assert _said(ask()) == ("unchecked", "nftables", "sudo nft list ruleset")


def test_nftables_that_decides_before_its_rules_lead_elsewhere(ask: Callable[[], CheckResult], install: Install) -> None:
    states = [{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": []}}}]
    elsewhere = [{"jump": {"target": "filter_INPUT"}}]
    opened = (states, _port("tcp", 6375, "accept"), _port("udp", 5353, "accept"), elsewhere)
    install("nft", _nft("drop", *opened))
    assert _said(ask()) == ("ok", "nftables", "")
    install("nft", _nft("accept", _port("tcp", 6375, "drop"), elsewhere))
    assert _said(ask()) == ("wrong", "nftables", "sudo nft insert rule inet filter input tcp dport 6375 accept")


@pytest.mark.parametrize(("ports", "status"), [({"set": [6375, 22]}, "ok"), (22, "wrong")])
def test_nftables_that_drops_all_but_some_ports(
    ports: object, status: str, ask: Callable[[], CheckResult], install: Install
) -> None:
    install("nft", _nft("accept", _port("tcp", ports, "drop", "!=")))
    assert ask().status.value == status


def test_nftables_that_only_root_may_ask(ask: Callable[[], CheckResult], install: Install) -> None:
    install("nft", "Operation not permitted (you must be root)\n", 1)
    assert _said(ask()) == ("unchecked", "nftables", SUDO)


def test_iptables_that_drops_by_default(ask: Callable[[], CheckResult], install: Install) -> None:
    install("iptables", IPTABLES_CLOSED)
    assert _said(ask()) == ("wrong", "iptables", "sudo iptables -I INPUT -p tcp --dport 6375 -j ACCEPT")


@pytest.mark.parametrize(
    ("rules", "status"),
    [
        ("-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp --dport 23 -j DROP\n", "ok"),
        ("-P INPUT ACCEPT\n", "ok"),
        ("-P INPUT DROP\n-A INPUT -p tcp -m multiport --dports 22,6375 -j ACCEPT\n-A INPUT -p udp --dport 5353 -j ACCEPT\n", "ok"),
        ("-P INPUT DROP\n-A INPUT -p tcp --dport 6000:7000 -j ACCEPT\n-A INPUT -p udp -j ACCEPT\n", "ok"),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp --dport 6375 -j REJECT\n", "wrong"),
        ("-P INPUT DROP\n-A INPUT -j my-own-chain\n", "unchecked"),
    ],
)
def test_other_rules_of_iptables(rules: str, status: str, ask: Callable[[], CheckResult], install: Install) -> None:
    install("iptables", rules)
    assert ask().status.value == status


MACOS_ON = "Firewall is enabled. (State = 1)\n"


@pytest.mark.parametrize(
    ("state", "apps", "status", "mend"),
    [
        ("Firewall is disabled. (State = 0)\n", "", "ok", ""),
        (MACOS_ON, f"1 :  {sys.executable}\n\t ( Allow incoming connections )\n", "ok", ""),
        (MACOS_ON, f"1 :  {sys.executable}\n\t ( Block incoming connections )\n", "wrong", "--unblockapp"),
        (MACOS_ON, "ALF: total number of apps = 0\n", "unchecked", "--unblockapp"),
        ("Firewall is enabled. (State = 2)\n", "", "wrong", "--setblockall off"),
    ],
)
def test_the_firewall_of_macos(
    state: str, apps: str, status: str, mend: str, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program is at a fixed path, so the answers are given here."""
    answers = {"--getglobalstate": state, "--getblockall": "Block all DISABLED!\n", "--listapps": apps}
    monkeypatch.setattr(sys, "platform", "darwin")
    [result] = firewall(replace(context, command=lambda words: CommandOutput(0, answers[words[-1]])))
    assert result.status.value == status
    assert mend in result.mend
