"""`meshd doctor`: look for faults of this device, its set-up and its connections, and say what to type."""

import asyncio
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from meshd.cli.support.arguments import Parser, add_client, add_json, settings_of
from meshd.cli.support.client import api_url, daemon_of, running_api
from meshd.cli.support.output import print_json, show
from meshd.cli.support.progress import Progress, progress
from meshd.config import Config, Settings
from meshd.errors import ConfigError, MeshdError, Overloaded, RemoteFailure, Unavailable
from meshd.settings import SETTINGS

EXAMPLE = "meshd doctor\n  meshd doctor smollm2:135m --json"
Row = Mapping[str, Any]
_MARKS = {"ok": "ok", "warning": "warning", "wrong": "WRONG", "unchecked": "unchecked"}
_WIDTH = max(map(len, _MARKS.values()))
_TOPICS = (
    *("settings", "interfaces", "discovery", "multicast", "mdns-port", "link-port", "api-port", "api-guard", "firewall"),
    *("peers", "peer-unreachable", "peer-refused", "peer-lost", "peer-copied", "peer-version", "other-cluster"),
    *("reach", "peer-reach", "peer-dials-back", "peer-multicast", "peer-clock", "notice", "broker"),
    *("cluster-key", "identity", "copied-folder", "certificate", "state-folder", "state-lock"),
    *("state-disk", "cache-disk", "models-disk", "hf-cache-disk", "memory", "cgroup", "swap", "open-files", "locked-memory"),
    *("huge-pages", "cpu-quota", "cpu-governor", "temperature", "battery", "clock", "container", "python", "packages"),
    *("backend", "speed", "models", "model", "model-disk"),
)
_ORDER = {check: place for place, check in enumerate(_TOPICS)}
"""Place of each result's id in the output. The ids are part of `--json`: they keep their meaning."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="also check what this model needs")
    add_json(parser)
    add_client(parser)


def run(args: Namespace) -> int:
    with progress() as shown:
        rows = collect(args, shown)
    faults = sum(row["status"] == "wrong" for row in rows)
    if args.json:
        print_json({"object": "mesh.doctor", "healthy": not faults, "checks": rows})
    else:
        show(render(rows))
    return 1 if faults else 0


def collect(args: Namespace, shown: Progress) -> list[dict[str, Any]]:
    """Run the checks in the daemon if it answers, otherwise here. Returns: the results, by topic."""
    settings = settings_of(args)
    try:
        url = api_url(settings)
        rows = _of_daemon(args, shown)
    except ConfigError as error:
        return [_row("settings", "wrong", error.message, error.hint)]
    except Overloaded:
        raise  # the daemon runs them for somebody else just now
    except MeshdError as error:
        named = settings.named("api") is not None or running_api(settings) is not None
        first = _no_daemon(error, named=named)
        return [first, _terminal(), *_in_order(_here(settings, args.model, shown))]
    return [_row("daemon", "ok", f"the daemon at {url} answers"), _terminal(), *_in_order(rows)]


def _of_daemon(args: Namespace, shown: Progress) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with daemon_of(args).stream("/mesh/v1/doctor", {"model": args.model} if args.model else {}) as stream:
        for step in stream.events():
            _show_step(shown, step["check"], step["done"], step["total"])
            rows += step["results"]
    return rows


def _no_daemon(error: MeshdError, *, named: bool) -> dict[str, Any]:
    """Say why no daemon runs the checks. It is a fault if there should be one: one was named, or one uses the state folder."""
    if isinstance(error, RemoteFailure):
        mend = error.hint or "install the same version of meshd, and start `meshd up` again"
        return _row("daemon", "wrong", f"the daemon can't run the checks: {error.message}; so they run here", mend)
    if not isinstance(error, Unavailable):
        return _row("daemon", "wrong", error.message, error.hint or "see the daemon's log")
    status = "wrong" if named else "warning"
    return _row("daemon", status, f"{error.message}; only what needs no daemon is checked", error.hint or "meshd up")


def _here(settings: Settings, model: str | None, shown: Progress) -> list[dict[str, Any]]:
    """Run the checks that need no daemon, in this process."""
    try:
        config = settings.config()
    except ConfigError as error:
        found = _row("settings", "wrong", error.message, error.hint)
        usable = _without_faulty(settings)
        return [found] if usable is None else [found, *asyncio.run(_run_here(usable, model, shown))]
    return asyncio.run(_run_here(config, model, shown))


def _without_faulty(settings: Settings) -> Config | None:
    """Make a configuration in which settings that can't be read have their defaults. Returns: None if that is not possible."""
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        if setting.name == "config":
            continue
        try:
            values[setting.key] = settings[setting.name].value
        except ConfigError:
            try:
                values[setting.key] = setting.computed(settings) if setting.computed else setting.default
            except ConfigError:
                return None
    return Config(**values)


async def _run_here(config: Config, model: str | None, shown: Progress) -> list[dict[str, Any]]:
    import msgspec

    from meshd.clock import SystemClock
    from meshd.doctor import CHECKS
    from meshd.doctor.check import Context, Runner

    rows: list[dict[str, Any]] = []
    async for step in Runner(CHECKS).run(Context(config=config, clock=SystemClock(), model=model)):
        _show_step(shown, step.check, step.done, step.total)
        rows += msgspec.to_builtins(step.results)
    return rows


def _show_step(shown: Progress, check: str, done: int, total: int) -> None:
    """Show the progress on a terminal. Elsewhere, a line for each check would say nothing that the results don't."""
    if sys.stderr.isatty():
        shown.update("checks", done, total, check)


def _in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort results by topic, those of one check in the order in which it gave them."""
    return sorted(rows, key=lambda row: _ORDER.get(row["check"], -1))


def _terminal() -> dict[str, Any]:
    """Check that the terminal can show what models write."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    if encoding in ("utf8", "utf16", "utf32"):
        return _row("terminal", "ok", "text of all languages can be printed")
    return _row(
        "terminal",
        "warning",
        f"the terminal's encoding is {encoding}: answers with other letters end in an error",
        "export LC_ALL=C.UTF-8",
    )


def _row(check: str, status: str, found: str, mend: str = "") -> dict[str, Any]:
    return {"check": check, "status": status, "found": found, "mend": mend, "subject": ""}


def render(rows: Iterable[Row]) -> str:
    """Format the results: one line for each, with what to type below it, and a summary."""
    rows = list(rows)
    lines = []
    for row in rows:
        subject = f" {row['subject']}" if row["subject"] else ""
        lines.append(f"{_MARKS[row['status']]:<{_WIDTH}}  {row['check']}{subject}: {row['found']}")
        if row["mend"] and row["status"] != "ok":
            lines.append(f"{'':<{_WIDTH}}  -> {row['mend']}")
    counts = {status: sum(row["status"] == status for row in rows) for status in _MARKS}
    if counts["wrong"]:
        lines.append(f"\n{counts['wrong']} wrong, {counts['warning']} warnings, {counts['unchecked']} unchecked, {counts['ok']} ok")
    else:
        lines.append(f"\nnothing is wrong: {counts['warning']} warnings, {counts['unchecked']} unchecked, {counts['ok']} ok")
    return "\n".join(lines)
