"""`meshd bench`: measure this device; with --mesh, its links to the other peers."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from meshd.cli.status import links_table
from meshd.cli.support.arguments import Parser, add_client, add_json, add_settings, settings_of
from meshd.cli.support.client import STREAM_SILENCE_S, daemon_of
from meshd.cli.support.interrupt import run_interruptibly
from meshd.cli.support.output import print_json, show, table
from meshd.cli.support.progress import Measuring
from meshd.config import Config
from meshd.display import ABSENT, duration, flops, rate, size

if TYPE_CHECKING:
    from meshd.agents.device.probe import ProbeResult

EXAMPLE = "meshd bench --threads 2\n  meshd bench --mesh"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--mesh", action="store_true", help="measure the running daemon's link to every peer instead")
    parser.add_argument("--cached", action="store_true", help="show the stored measurement if this device has not changed since")
    add_settings(parser, ("threads", "backend", "exact", "memory", "cache"))
    add_json(parser)
    add_client(parser)


def run(args: Namespace) -> int:
    if args.mesh:
        links = daemon_of(args).post("/mesh/v1/links/probe", {}, timeout_s=STREAM_SILENCE_S)
        _print(args, links, links_table(links["data"]) if links["data"] else "no links: there is no other peer")
        return 0
    from meshd.agents.device.probe import report

    device = report(measure(settings_of(args).config(), refresh=not args.cached))
    _print(args, device, render(device))
    return 0


def measure(config: Config, *, refresh: bool = False) -> "ProbeResult":
    """Measure this device, or load its stored measurement, and show the progress. Raises: LocalFault."""
    from meshd.agents.device.probe import probe
    from meshd.clock import SystemClock

    measuring = Measuring()
    try:
        return run_interruptibly(
            probe(
                config.cache,
                clock=SystemClock(),
                threads=config.threads,
                backend=config.wanted_backend,
                memory_cap_bytes=config.memory_bytes,
                refresh=refresh,
                progress=measuring,
            )
        )
    finally:
        measuring.close()


def render(device: dict[str, Any]) -> str:
    """Format what `meshd.agents.device.probe.report` returns."""
    how = "as measured before" if device["cached"] else f"measured in {duration(device['elapsed_s'])}"
    free, total = size(device["memory_free_bytes"]), size(device["memory_total_bytes"])
    lines = [
        f"{device['processor']}: {device['cores']} cores, {device['threads']} threads, {how}",
        f"memory: {free} free of {total}, bound by {device['memory_bound_by']}",
        f"disk: {rate(device['rates']['disk_bytes_s'])}",
        f"numerics: {device['numerics']}",
    ]
    headers = ("BACKEND", "DECODE", "PREFILL", "ATTENTION", "MEMORY", "LAYER OVERHEAD", "")
    return "\n".join([*lines, "", table(headers, (_backend(trial, device["backend"]) for trial in device["backends"]))])


def _backend(trial: dict[str, Any], best: str) -> tuple[str, ...]:
    rates = trial.get("rates")
    if not rates:
        return (trial["backend"], *[ABSENT] * 5, trial.get("error", ""))
    return (
        trial["backend"],
        rate(rates["decode_bytes_s"]),
        flops(rates["prefill_flops_s"]),
        rate(rates["attention_bytes_s"]),
        rate(rates["memory_bytes_s"]),
        duration(rates["layer_overhead_s"]),
        "used" if trial["backend"] == best else "",
    )


def _print(args: Namespace, document: Any, text: str) -> None:
    if args.json:
        print_json(document)
    else:
        show(text)
