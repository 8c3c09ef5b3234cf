"""Inject faults of every kind into a mesh of real daemons while clients use it. Each answer must equal that of an undisturbed mesh.

    python tests/chaos/run.py --seed 1 [--peers 5] [--clients 8] [--faults 200] [--minutes 60] [--short] [--keep DIR]

Uses hosts in network namespaces if it can. Otherwise it prints why not, and its faults hit only processes, not links. The seed
determines the requests and the kinds, order and severity of the faults. Which peer is hit depends on which peers work at that
moment. Prints a table of pauses, and what each daemon holds after 15 s without clients. If an answer is wrong or does not end,
something leaks, or a peer without a fault is blamed, the exit status is 1, the stories of the sessions concerned are printed, and
the daemons' logs are kept.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from chaos.blame import wrong_blame
from chaos.clients import ClientPool, ClientRequest, make_long, make_specs, stages_over, with_stop
from chaos.faults import FaultInjector
from chaos.repairs import DRAIN_S, FAST, InjectedFault, Repairs
from chaos.schedule import Fault, make_schedule
from chaos.verdict import Reading, leaks, longest, median_gap_s, read_all, table
from real_daemons.mesh import Mesh, MeshBroken, pull_model, running
from real_daemons.sites import make_site
from real_daemons.streams import Answer, Spec, ask

_REST_S = 15.0
_SETTLE_S = 3.0
_UNDISTURBED_ANSWER_S = 120.0
_PROMPT_WORDS = 1000


class Run:
    """One run: the undisturbed answers, the faults, and the verdict."""

    def __init__(self, mesh: Mesh, options: argparse.Namespace, folder: Path) -> None:
        self._mesh = mesh
        self._folder = folder
        self._options = options
        self._started = time.monotonic()
        self._undisturbed: dict[str, Answer] = {}
        """Answers from before the first fault, by the name of their request."""
        self._names = {str(row["id"]): str(row["name"]) for host in mesh for row in host.rows("peers")}
        self._problems: list[str] = []
        self._injector: FaultInjector
        self._repairs: Repairs
        self._print_lock = threading.Lock()

    def say(self, text: str) -> None:
        with self._print_lock:
            print(f"[{time.monotonic() - self._started:7.1f} s] {text}", flush=True)

    def go(self) -> list[str]:
        """Run everything from the undisturbed answers to the check for leaks. Returns: a line for each problem."""
        options = self._options
        short = options.short
        specs = self._answer_undisturbed(make_specs(options.seed, 6 if short else 18, (40, 80) if short else (64, 200)))
        long = make_long(options.seed, _PROMPT_WORDS // 2 if short else _PROMPT_WORDS)
        self._answer_undisturbed([long], stop=False)
        time.sleep(_SETTLE_S)
        before = read_all(self._mesh)
        for name, reading in before.items():
            self.say(f"before: {name}: {reading}")
        repairs = self._repairs = Repairs(self._mesh, self.say)
        clients = ClientPool(self._mesh.site, specs, repairs.healthy, self._judge, options.seed)
        injector = self._injector = FaultInjector(self._mesh, clients, repairs, long, self.say)
        schedule = make_schedule(options.seed, options.faults, network=self._mesh.site.has_network)
        clients.start(options.clients)
        try:
            self._inject_all(injector, schedule)
            self.say("no more faults; the last ones are being repaired")
        except MeshBroken as error:
            self._wrong(str(error))
        repairs.finish()
        clients.stop()
        self._problems += repairs.problems
        for request in clients.current.values():
            self._wrong(f"{request.answer.spec.name} (session {request.answer.session}) never ended", request)
        self._print_results(injector.injected, clients)
        self._check_leaks(before)
        return self._problems

    def _inject_all(self, injector: FaultInjector, schedule: list[Fault]) -> None:
        until = time.monotonic() + 60 * self._options.minutes
        for fault in schedule:
            if time.monotonic() > until:
                self.say(f"{self._options.minutes:g} minutes are over")
                return
            injector.check_running()
            injector.inject(fault)

    def _answer_undisturbed(self, specs: list[Spec], *, stop: bool = True) -> list[Spec]:
        """Send each request to the mesh twice, for one peer and for three peers to compute; the answers must agree.

        With `stop`, send half of the requests once more with a stop string. Returns: all requests that were answered.
        """
        names = list(self._mesh.hosts)
        with ThreadPoolExecutor(2) as pool:
            first = list(pool.map(lambda spec: self._undisturbed_answer(names[0], spec, f"{names[0]}:0-30"), specs))
            split = list(pool.map(lambda spec: self._undisturbed_answer(names[1], spec, stages_over(names[:3], (10, 20))), specs))
            for spec, by_one, by_three in zip(specs, first, split, strict=True):
                self._undisturbed[spec.name] = by_one
                for difference in by_three.differences_from(by_one):
                    self._wrong(f"{spec.name}, undisturbed, by three peers and by one: {difference}")
            stopped = [found for spec in specs[::2] if stop and (found := with_stop(spec, self._undisturbed[spec.name]))]
            answers = pool.map(lambda spec: self._undisturbed_answer(names[0], spec, ""), stopped)
            self._undisturbed |= {spec.name: answer for spec, answer in zip(stopped, answers, strict=True)}
        events = sum(len(self._undisturbed[spec.name].times) for spec in [*specs, *stopped])
        self.say(f"undisturbed: {len(specs) + len(stopped)} answers, {events} events")
        return [*specs, *stopped]

    def _undisturbed_answer(self, at: str, spec: Spec, stages: str) -> Answer:
        answer = Answer(spec)
        ask(self._mesh.site, at, answer, {"stages": stages} if stages else {}, silence_s=_UNDISTURBED_ANSWER_S)
        return answer

    def _judge(self, request: ClientRequest) -> None:
        """Compare an answer with the undisturbed one. A client's thread calls this for each answer that has ended."""
        spec, answer = request.answer.spec, request.answer
        request.story = self._mesh.story(answer.session)
        for blame in wrong_blame(request.story, self._names, self._repairs.times):
            self._wrong(f"{spec.name} (session {answer.session}): {blame}", request)
        if request.problem:
            self._wrong(f"{spec.name} (session {answer.session}): {request.problem}", request)
        elif differences := answer.differences_from(self._undisturbed[spec.name]):
            self._wrong(f"{spec.name} (session {answer.session}, over {answer.plan}): {'; '.join(differences)}", request)

    def _wrong(self, what: str, request: ClientRequest | None = None) -> None:
        self._problems.append(what)
        self.say(f"WRONG: {what}")
        if request is not None and request.answer.session:
            self.say(f"story of {request.answer.session}:\n{self._mesh.story_text(request.answer.session)}")

    def _print_results(self, faults: list[InjectedFault], clients: ClientPool) -> None:
        ended = clients.ended
        print("\n".join(["", *table(faults, ended), ""]))
        for pause, injected, request in longest(faults, ended, 5):
            print(
                f"  {pause:.2f} s in session {request.answer.session} after fault {injected.fault.number}, {injected.fault.label}"
            )
            self._write_story(pause, injected, request)
        notes = [f"{one.fault.label}: {one.note}" for one in faults if one.note]
        for note in sorted(set(notes)):
            print(f"  {note} ({notes.count(note)})")
        resumed = sum(request.resumed > 0 for request in ended)
        restarted = sum(request.restarted for request in ended)
        events = sum(len(request.answer.times) for request in ended)
        print(f"{len(ended)} answers of {events} events ended, {resumed} of them after their client had resumed at another peer;")
        print(f"{restarted} requests were sent again, since no event had come;")
        print(f"the median time between two tokens was {1000 * median_gap_s(ended):.0f} ms")
        print("errors of clients: " + (", ".join(f"{what} ({count})" for what, count in sorted(clients.errors.items())) or "none"))

    def _write_story(self, pause: float, injected: InjectedFault, request: ClientRequest) -> None:
        """Write a file beside the logs: the times of an answer's events, in seconds since the fault, and the session's story."""
        lines = [f"{pause:.2f} s after fault {injected.fault.number}, {injected.fault.label}: {request.answer.spec.name}"]
        lines += [f"event {at - injected.at:8.3f} s" for at in request.answer.times]
        with (self._folder / f"story-{request.answer.session}.txt").open("w") as file:
            file.write("\n".join([*lines, *map(json.dumps, request.story)]) + "\n")

    def _check_leaks(self, before: dict[str, Reading]) -> None:
        self.say(f"waiting {_REST_S:.0f} s without clients")
        time.sleep(_REST_S)
        after = read_all(self._mesh)
        for name, reading in after.items():
            self.say(f"after: {name} ({self._mesh[name].starts} starts): {reading}")
        for leak in leaks(before, after):
            self._wrong(leak)
        for host in self._mesh:
            for line in host.log.read_text(errors="replace").splitlines():
                if "level=error" in line or "Traceback" in line:
                    self._wrong(f"{host.name} logged: {line[:500]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: a new one")
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=90.0, help="start no new fault after this time")
    parser.add_argument("--short", action="store_true", help="fewer and shorter requests, for a run of a minute")
    parser.add_argument("--keep", type=Path, help="folder for the daemons' logs; default: they are kept only if something is wrong")
    options = parser.parse_args()
    if options.peers < 5:
        parser.error("--peers must be at least 5: two may have a fault while three work")
    signal.signal(signal.SIGTERM, _interrupted)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="meshd-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    problems = ["the run was cut short"]
    try:
        problems = _run(options, folder)
    finally:
        if not problems and options.keep is None:
            shutil.rmtree(folder)
        else:
            print(f"logs are in {folder}")
    for problem in problems:
        print(f"WRONG: {problem}")
    verdict = f"{len(problems)} problems" if problems else "nothing wrong, lost, repeated or left behind"
    print(f"seed {options.seed}: {verdict}", flush=True)
    return 1 if problems else 0


def _run(options: argparse.Namespace, folder: Path) -> list[str]:
    pull_model()
    site, why_not = make_site(options.peers)
    where = f"{options.peers} hosts in network namespaces" if not why_not else f"processes only, no faults of links: {why_not}"
    print(f"seed {options.seed}: {options.peers} peers, {options.clients} clients, {options.faults} faults; {where}", flush=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start, one thread a daemon", flush=True)
    script = str(Path(__file__).parents[1] / "lib/chaos/garbage_daemon.py")
    with running(site, folder, flags=("--drain-timeout", f"{DRAIN_S:.0f}"), entry=(script,)) as mesh:
        if site.has_network:
            for name in site.names:
                site.shape(name, *FAST)
        return Run(mesh, options, folder).go()


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
