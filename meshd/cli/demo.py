"""`meshd demo`: run three daemons on this machine that find one another, share a model's layers and stream an answer.

Then they get the same question again, and one of them is killed in the middle of its answer.
"""

import signal
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from meshd.cli.bench import measure
from meshd.cli.place import place
from meshd.cli.support.answering import AnswerSummary, stream_answer, write_out
from meshd.cli.support.arguments import Parser, add_settings, settings_of
from meshd.cli.support.children import ChildDaemon, ChildDaemons, free_ports, wait_until
from meshd.cli.support.client import Daemon
from meshd.cli.support.fetching import fetch, store_of
from meshd.config import Config
from meshd.display import duration
from meshd.errors import NotReady, RemoteFailure

EXAMPLE = 'meshd demo --prompt "Name three rivers."\n  meshd demo --keep'
MODEL = "smollm2:135m"
PROMPT = "Why is the sky blue? Answer in two sentences."
NAMES = ("ash", "birch", "cedar")
MAX_TOKENS = 96
CONTEXT = 2048
START_WITHIN_S = 120.0
FIND_WITHIN_S = 30.0
MEASURE_WITHIN_S = 30.0
STANDBY_WITHIN_S = 30.0
KILL_AFTER = 8
"""Number of text chunks that arrive before a daemon is killed."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", default=PROMPT, help="the question; default: %(default)s")
    parser.add_argument(
        "--keep", action="store_true", help="keep the two surviving daemons running after the answers, until Ctrl-C"
    )
    add_settings(parser, ("backend", "cache", "models-dir", "hf-cache", "pypi-index", "config"))


def run(args: Namespace) -> int:
    with _ended_by_signals(), tempfile.TemporaryDirectory(prefix="meshd-demo-") as folder:
        fixed = {"state": folder, "threads": "1"}
        config = settings_of(args, fixed).config()
        fetch(store_of(config), MODEL)
        # Measured with one thread, and stored apart from the measurement of this device's own daemon, which uses all threads.
        config = replace(config, cache=config.cache / "demo")
        measure(config)
        with ChildDaemons(Path(folder)) as daemons:
            say = _Stopwatch().say
            apis = _start(daemons, config, say)
            _show_discovery(daemons.children, apis, say)
            _show_links(apis[0], say)
            split = _show_placement(apis[0], say)
            _show_standby(apis[0], say)
            expected = _show_answer(apis[0], args.prompt, split)
            _show_loss(daemons.children[-1], apis[0], args.prompt, split, expected, say)
            if args.keep:
                _keep(daemons.children[:-1], apis[:-1])
    return 0


class _Stopwatch:
    """Prints lines with the time since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.1f} s] {text}", flush=True)


Say = Callable[[str], None]


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and a closed terminal end the demo as Ctrl-C does, so that it stops its daemons before it exits."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    ends = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = [signal.signal(number, interrupt) for number in ends]
    try:
        yield
    finally:
        for number, handler in zip(ends, before, strict=True):
            signal.signal(number, handler)


def _start(daemons: ChildDaemons, config: Config, say: Say) -> list[Daemon]:
    """Start three daemons in a new cluster, each with one thread. They share models and measurements.

    Returns: their clients, in the order of NAMES.
    """
    say(f"starting {', '.join(NAMES)}: three daemons, one thread each")
    links = {name: f"127.0.0.1:{port}" for name, port in zip(NAMES, free_ports(len(NAMES)), strict=True)}
    common = [
        *("--api", "127.0.0.1:0", "--interface", "127.0.0.1"),
        *("--threads", "1", "--backend", config.backend, "--cache", str(config.cache), "--models-dir", str(config.models_dir)),
        *("--hf-cache", str(config.hf_cache)),
    ]
    join_code = _new_key()
    for name in NAMES:
        others = [part for other in NAMES if other != name for part in ("--peer", links[other])]
        daemons.start(name, join_code, [*common, "--link", links[name], *others])
    apis: dict[str, Daemon] = {}

    def all_listen() -> bool:
        for child in daemons.children:
            if child.name not in apis and (daemon := child.daemon()):
                apis[child.name] = daemon
                say(f"{child.name} is up: {daemon.url}")
        return len(apis) == len(NAMES)

    wait_until(all_listen, START_WITHIN_S, "the start of three daemons")
    return [apis[name] for name in NAMES]


def _new_key() -> str:
    import os

    from meshd.protocol.identity import ClusterKey

    return ClusterKey.generate(os.urandom).code


def _show_discovery(children: Sequence[ChildDaemon], apis: Sequence[Daemon], say: Say) -> None:
    """Wait until each daemon has an authenticated link to both of the others."""
    seen: set[tuple[str, str]] = set()

    def all_linked() -> bool:
        for child, daemon in zip(children, apis, strict=True):
            for row in daemon.rows("/mesh/v1/peers"):
                pair = child.name, row["name"]
                if row["state"] == "alive" and row["capability"] and child.name != row["name"] and pair not in seen:
                    seen.add(pair)
                    say(f"{child.name} found {row['name']} ({', '.join(row['sources'])})")
        return len(seen) == len(children) * (len(children) - 1)

    wait_until(all_linked, FIND_WITHIN_S, "finding one another")


def _show_links(daemon: Daemon, say: Say) -> None:
    """Wait until both directions of every link are measured, since the planner needs these measurements."""
    rows: list[dict[str, Any]] = []

    def all_measured() -> bool:
        rows[:] = daemon.rows("/mesh/v1/links")
        return len(rows) == len(NAMES) * (len(NAMES) - 1)

    wait_until(all_measured, MEASURE_WITHIN_S, "measuring the links")
    hops = sorted(row["hop_s"] for row in rows)
    say(f"links measured both ways: a small message takes {duration(hops[0])} to {duration(hops[-1])}")


def _show_placement(daemon: Daemon, say: Say) -> str:
    """Place the model on all three daemons, for throughput: for latency, the planner would use only one. Returns: the split."""
    question = {"model": MODEL, "objective": "throughput", "context": CONTEXT, "mesh": {"min_peers": len(NAMES)}}
    plan = daemon.post("/mesh/v1/plan", question)
    say("the plan for three devices:")
    for line in plan["text"]:
        print(f"{'':10}{line}")
    split: str = plan["plan"]
    for line in place(daemon, {"model": MODEL, "stages": split, "context": CONTEXT}):
        say(line)
    return split


def _question(prompt: str, split: str) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": MAX_TOKENS}
    return body | {"mesh": {"stages": split, "context": CONTEXT}}


def _show_answer(daemon: Daemon, prompt: str, split: str) -> AnswerSummary:
    print(f"\n>>> {prompt}")
    answer = stream_answer(daemon, _question(prompt, split), write_out)
    print(f"\n\n[{answer.summary()}]\n", flush=True)
    return answer


def _show_standby(daemon: Daemon, say: Say) -> None:
    """Wait until every layer has a standby copy on a second device, or until STANDBY_WITHIN_S has passed."""
    standby: list[str] = []

    def all_twice() -> bool:
        active = [held for row in daemon.rows("/mesh/v1/peers") for held in row["holdings"] if held["state"] == "active"]
        standby[:] = [held["layers"] for held in active if held["standby"]]
        return {held["layers"] for held in active if not held["standby"]} <= set(standby)

    try:
        wait_until(all_twice, STANDBY_WITHIN_S, "standby copies")
    except NotReady:
        say("some layers have no standby copy, because memory is short; they are loaded again after a loss")
    else:
        say(f"a second device holds a copy of every layer: standby copies of {', '.join(sorted(standby))}")


def _show_loss(victim: ChildDaemon, daemon: Daemon, prompt: str, split: str, expected: AnswerSummary, say: Say) -> None:
    """Ask the same question, and kill the last stage's daemon during the answer. Raises: RemoteFailure if the answer changes."""
    say(f"the same question again, and {victim.name} is killed in mid-answer")
    print(f"\n>>> {prompt}")
    times: list[float] = []

    def write(text: str) -> None:
        times.append(time.monotonic())
        write_out(text)
        if len(times) == KILL_AFTER:
            victim.process.kill()
            write_out(f" [{victim.name} killed] ")

    answer = stream_answer(daemon, _question(prompt, split), write)
    if len(times) < KILL_AFTER:
        print(
            f"\n\n[the answer was too short to kill a daemon in the middle of it: ask for more than {KILL_AFTER} words]", flush=True
        )
        return
    pause_s = max((after - before for before, after in pairwise(times)), default=0.0)
    same = "the same answer as before, word for word" if answer.text == expected.text else "NOT the same answer as before"
    print(f"\n\n[{same}; the longest pause was {duration(pause_s)}]", flush=True)
    if answer.text != expected.text:
        raise RemoteFailure("the answer changed when a peer was lost", hint="please report this")


def _keep(children: Sequence[ChildDaemon], apis: Sequence[Daemon]) -> None:
    print("\nThe two other daemons run until Ctrl-C. Try in another terminal:")
    for child, daemon in zip(children, apis, strict=True):
        print(f"  meshd status --api {daemon.url}    # {child.name}")
    print(f'  meshd run {MODEL} "Hello" --api {apis[0].url}', flush=True)
    while all(child.process.poll() is None for child in children):
        time.sleep(0.2)
