"""Checks whether a firewall of this device keeps peers out, and gives the command that lets them in."""

import json
import re
import sys
from collections.abc import Iterable
from typing import Any

from meshd.agents.cluster_service import CheckResult
from meshd.doctor.check import CommandOutput, Context, Found, ok, read_text, unchecked, wrong
from meshd.values import parse_address

MDNS_PORT = 5353
_APPLE = "/usr/libexec/ApplicationFirewall/socketfilterfw"
_SUDO = "sudo meshd doctor"


def firewall(context: Context) -> Found:
    """Ask each firewall that is installed. The first one that is active decides: it writes the rules of those below it."""
    port, mdns = _link_port(context), "mdns" in context.config.discovery
    askers = (_apple,) if sys.platform == "darwin" else (_ufw, _firewalld, _nftables, _iptables)
    for ask in askers:
        found = ask(context, port, mdns)
        if found is not None:
            return [found]
    return [ok("firewall", "no firewall is active")]


def _link_port(context: Context) -> int:
    return parse_address(context.peer.link, 0).port if context.peer is not None else context.config.link.port


def _wanted(port: int, mdns: bool) -> list[str]:
    return [f"{port}/tcp"] + [f"{MDNS_PORT}/udp"] * mdns


def _needs_root(output: CommandOutput) -> bool:
    words = ("root", "permission", "not permitted", "authorization", "superuser")
    return bool(output.status) and any(word in output.text.lower() for word in words)


def _ufw(context: Context, port: int, mdns: bool) -> CheckResult | None:
    """Ask ufw (Ubuntu). Its configuration says whether it is active also to those who may not ask it."""
    output = context.command(("ufw", "status"))
    if output is None:
        return None
    enabled = re.search(r"^ENABLED=yes", read_text(context.root / "etc/ufw/ufw.conf"), re.MULTILINE) is not None
    if output.status:
        why = "ufw is active; only root can see its rules"
        return unchecked("firewall", why, _SUDO, "ufw") if enabled and _needs_root(output) else None
    if "Status: active" not in output.text:
        return None
    allowed = [
        line.split()[0].replace(":", "-") for line in output.text.splitlines() if re.search(r"\S +ALLOW\b(?! OUT| FWD)", line)
    ]
    # Without a port, a rule lets its sources in everywhere; without a protocol, by both.
    ports = [each if "/" in each else f"{each}/{protocol}" for each in allowed for protocol in ("tcp", "udp")]
    closed = [each for each in _wanted(port, mdns) if "Anywhere" not in allowed and not _in_ports(each, ports)]
    if not closed:
        return ok("firewall", "ufw is active and lets peers in", "ufw")
    mend = " && ".join(f"sudo ufw allow {each}" for each in closed)
    return wrong("firewall", f"ufw keeps peers out: {' and '.join(closed)} {_are(closed)} closed", mend, "ufw")


def _firewalld(context: Context, port: int, mdns: bool) -> CheckResult | None:
    """Ask firewalld (Fedora, RHEL, SUSE) for its default zone."""
    state = context.command(("firewall-cmd", "--state"))
    if state is None or "running" not in state.text or "not running" in state.text:
        return None
    zone = context.command(("firewall-cmd", "--list-all"))
    if zone is None or zone.status:
        return unchecked("firewall", "firewalld is active; only root can see its rules", _SUDO, "firewalld")
    facts = dict(line.strip().partition(":")[::2] for line in zone.text.splitlines() if ":" in line)
    if facts.get("target", "").strip() == "ACCEPT":
        return ok("firewall", "firewalld is active and lets everything in", "firewalld")
    ports, services = facts.get("ports", "").split(), facts.get("services", "").split()
    closed = [each for each in _wanted(port, mdns) if not _in_ports(each, ports)]
    closed = [each for each in closed if not (each == f"{MDNS_PORT}/udp" and "mdns" in services)]
    if not closed:
        return ok("firewall", "firewalld is active and lets peers in", "firewalld")
    options = " ".join("--add-service=mdns" if each == f"{MDNS_PORT}/udp" else f"--add-port={each}" for each in closed)
    mend = f"sudo firewall-cmd --permanent {options} && sudo firewall-cmd --reload"
    return wrong("firewall", f"firewalld keeps peers out: {' and '.join(closed)} {_are(closed)} closed", mend, "firewalld")


def _in_ports(wanted: str, ports: Iterable[str]) -> bool:
    """Whether a list of ports and ranges (`6000-7000/tcp`) contains a port."""
    number, _, protocol = wanted.partition("/")
    for text in ports:
        numbers, _, kind = text.partition("/")
        first, _, last = numbers.partition("-")
        if kind == protocol and first.isdecimal() and int(first) <= int(number) <= int(last or first):
            return True
    return False


def _nftables(context: Context, port: int, mdns: bool) -> CheckResult | None:
    """Read the rules of nftables: chains that hook incoming packets and drop them by default, or rules that drop these ports."""
    output = context.command(("nft", "-j", "list", "ruleset"))
    if output is None:
        return None
    if output.status:
        return unchecked("firewall", "only root can see the rules of nftables", _SUDO, "nftables") if _needs_root(output) else None
    try:
        entries: list[dict[str, Any]] = json.loads(output.text)["nftables"]
    except (ValueError, KeyError):
        return unchecked("firewall", "the rules of nftables can't be read", "nft list ruleset", "nftables")
    chains = [entry["chain"] for entry in entries if "chain" in entry and entry["chain"].get("hook") == "input"]
    rules = [entry["rule"] for entry in entries if "rule" in entry]
    if not chains:
        return None
    closed: dict[str, str] = {}
    followed = True
    for chain in chains:
        where = (chain["family"], chain["table"], chain["name"])
        own = [rule.get("expr", []) for rule in rules if (rule["family"], rule["table"], rule["chain"]) == where]
        for each in _wanted(port, mdns):
            decision = _nft_decision(own, chain.get("policy", "accept"), each)
            followed = followed and bool(decision)
            if decision in ("drop", "reject"):
                closed[each] = " ".join(where)
    if not closed and not followed:
        found = "nftables has chains, maps or sets of its own, which are not followed"
        return unchecked("firewall", found, "sudo nft list ruleset", "nftables")
    if not closed:
        return ok("firewall", "nftables is active and lets peers in", "nftables")
    mend = " && ".join(f"sudo nft insert rule {chain} {_nft_match(each)} accept" for each, chain in closed.items())
    return wrong("firewall", f"nftables keeps peers out: {' and '.join(closed)} {_are(closed)} closed", mend, "nftables")


def _nft_decision(rules: Iterable[list[Any]], policy: str, wanted: str) -> str:
    """Returns: what the first rule that decides about a new packet to this port says, or the policy; empty if a rule before it goes
    on elsewhere."""
    for expressions in rules:
        if verdict := _nft_verdict(expressions, wanted):
            return verdict
        if _nft_leads_on(expressions):
            return ""
    return policy


def _nft_leads_on(expressions: list[Any]) -> bool:
    """Whether a rule jumps to another chain, or looks a port up in a map or a named set: what it decides is not in the rule."""
    matches = [part["match"] for part in expressions if "match" in part]
    keys = [part["vmap"].get("key") for part in expressions if "vmap" in part]
    keys += [match.get("left") for match in matches if isinstance(match.get("right"), str)]
    return any("payload" in str(key) for key in keys) or any(word in part for part in expressions for word in ("jump", "goto"))


def _nft_match(wanted: str) -> str:
    number, _, protocol = wanted.partition("/")
    return f"{protocol} dport {number}"


def _nft_verdict(expressions: list[Any], wanted: str) -> str:
    """Returns: `accept`, `drop` or `reject` if a rule decides about a new packet to this port; empty if it does not, or may not."""
    number, _, protocol = wanted.partition("/")
    for part in expressions:
        if "match" in part:
            match = part["match"]
            is_port = match.get("left", {}).get("payload") == {"protocol": protocol, "field": "dport"}
            if not is_port or _nft_has(match.get("right"), int(number)) == (match.get("op") == "!="):
                return ""
    return next((word for part in expressions for word in ("accept", "drop", "reject") if word in part), "")


def _nft_has(right: Any, number: int) -> bool:
    match right:
        case int():
            return right == number
        case {"set": list(values)}:
            return any(_nft_has(value, number) for value in values)
        case {"range": [int(first), int(last)]}:
            return first <= number <= last
    return False


def _iptables(context: Context, port: int, mdns: bool) -> CheckResult | None:
    """Read the chain INPUT of iptables. A jump to another chain leaves open what that chain does."""
    output = context.command(("iptables", "-S", "INPUT"))
    if output is None:
        return None
    if output.status:
        return unchecked("firewall", "only root can see the rules of iptables", _SUDO, "iptables") if _needs_root(output) else None
    lines = output.text.splitlines()
    verdicts = {each: _iptables_verdict(lines, each) for each in _wanted(port, mdns)}
    closed = [each for each, verdict in verdicts.items() if verdict in ("DROP", "REJECT")]
    if closed:
        mend = " && ".join(
            f"sudo iptables -I INPUT -p {each.partition('/')[2]} --dport {each.partition('/')[0]} -j ACCEPT" for each in closed
        )
        return wrong("firewall", f"iptables keeps peers out: {' and '.join(closed)} {_are(closed)} closed", mend, "iptables")
    if any(verdict not in ("ACCEPT", "") for verdict in verdicts.values()):
        return unchecked("firewall", "iptables has chains of its own, which are not followed", "sudo iptables -S", "iptables")
    active = any(line.startswith("-A") for line in lines)
    return ok("firewall", "iptables is active and lets peers in", "iptables") if active else None


def _iptables_verdict(lines: list[str], wanted: str) -> str:
    """Returns: the target of the first rule that decides about a new packet to this port, or the policy."""
    protocol = wanted.partition("/")[2]
    policy = ""
    for line in lines:
        words = line.split()
        if words[:1] == ["-P"]:
            policy = words[2]
            continue
        target = words[words.index("-j") + 1] if "-j" in words else ""
        ports = next((words[words.index(flag) + 1] for flag in ("--dport", "--dports") if flag in words), "")
        others = [flag for flag in ("-i", "-s", "--ctstate", "--state", "-d") if flag in words]
        if others or (ports and not _in_ports(wanted, (f"{each.replace(':', '-')}/{protocol}" for each in ports.split(",")))):
            continue
        if "-p" in words and words[words.index("-p") + 1] != protocol:
            continue
        if target and target not in ("LOG", "NFLOG"):
            return target
    return policy


def _apple(context: Context, port: int, mdns: bool) -> CheckResult | None:
    """Ask the application firewall of macOS, which decides by program and not by port."""
    state = context.command((_APPLE, "--getglobalstate"))
    if state is None or "State = 0" in state.text or "disabled" in state.text:
        return None
    allow = f"sudo {_APPLE} --add {sys.executable} && sudo {_APPLE} --unblockapp {sys.executable}"
    everything = context.command((_APPLE, "--getblockall"))
    if everything is not None and "State = 2" in state.text:
        return wrong("firewall", "macOS blocks all incoming connections", f"sudo {_APPLE} --setblockall off && {allow}", "macOS")
    apps = context.command((_APPLE, "--listapps"))
    listed = apps.text if apps is not None else ""
    at = listed.find(sys.executable)
    if at >= 0 and "Allow incoming" in listed[at : at + 300]:
        return ok("firewall", "macOS's firewall lets this Python in", "macOS")
    if at >= 0 and "Block incoming" in listed[at : at + 300]:
        return wrong("firewall", "macOS's firewall blocks this Python", allow, "macOS")
    return unchecked("firewall", "macOS's firewall is on, and asks when this Python first listens", allow, "macOS")


def _are(items: Iterable[str]) -> str:
    return "is" if len(list(items)) == 1 else "are"
