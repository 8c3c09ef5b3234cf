"""A mesh of real daemons under faults of every kind, while clients ask: each answer must equal that of an undisturbed mesh.

    python tests/chaos/run.py --seed 1 [--peers 5] [--clients 4] [--faults 200] [--minutes 60] [--short] [--keep DIR]

Uses hosts in network namespaces where that is possible; elsewhere it says so and only disturbs processes. The seed fixes the kinds
of faults, their order and hardness, and the requests; which peer is hit depends on which one works at that moment. Prints the table
of pauses, and what was left after 15 s of rest. Exit status 1 and the stories of the sessions concerned if any answer is wrong,
does not end, or anything leaks; the daemons' logs are kept then.
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

from chaos.clients import Asked, Crowd, make_long, make_specs, stages_over, with_stop
from chaos.faults import DRAIN_S, FAST, Storm, Struck
from chaos.schedule import Fault, make_schedule
from chaos.verdict import Reading, leaks, longest, read_all, table, usual_gap_s
from real_daemons.mesh import Mesh, MeshBroken, pull_model, running
from real_daemons.sites import make_site
from real_daemons.streams import Answer, Spec, ask

_REST_S = 15.0
_CALM_S = 3.0
_CALM_ANSWER_S = 120.0
_PROMPT_WORDS = 1000


class Run:
    """One run from the calm answers to the verdict."""

    def __init__(self, mesh: Mesh, options: argparse.Namespace, folder: Path) -> None:
        self._mesh = mesh
        self._folder = folder
        self._options = options
        self._started = time.monotonic()
        self._calm: dict[str, Answer] = {}
        self._problems: list[str] = []
        self._storm: Storm
        self._saying = threading.Lock()

    def say(self, text: str) -> None:
        with self._saying:
            print(f"[{time.monotonic() - self._started:7.1f} s] {text}", flush=True)

    def go(self) -> list[str]:
        """The whole run; what was wrong."""
        options = self._options
        short = options.short
        specs = self._answer_calmly(make_specs(options.seed, 6 if short else 18, (40, 80) if short else (64, 200)))
        long = make_long(options.seed, _PROMPT_WORDS // 2 if short else _PROMPT_WORDS)
        self._answer_calmly([long], stop=False)
        time.sleep(_CALM_S)
        calm = read_all(self._mesh)
        for name, reading in calm.items():
            self.say(f"calm: {name}: {reading}")
        crowd = Crowd(self._mesh.site, specs, lambda: storm.well(), self._judge, options.seed)
        storm = self._storm = Storm(self._mesh, crowd, long, self.say)
        schedule = make_schedule(options.seed, options.faults, network=self._mesh.site.has_network)
        crowd.start(options.clients)
        try:
            self._strike_all(storm, schedule)
            self.say("no more faults; what is on is mended")
        except MeshBroken as error:
            self._wrong(str(error))
        storm.finish()
        crowd.stop()
        self._problems += storm.problems
        for asked in crowd.now.values():
            self._wrong(f"{asked.answer.spec.name} (session {asked.answer.session}) never ended", asked)
        self._tell(storm, crowd)
        self._look_what_is_left(calm)
        return self._problems

    def _strike_all(self, storm: Storm, schedule: list[Fault]) -> None:
        until = time.monotonic() + 60 * self._options.minutes
        for fault in schedule:
            if time.monotonic() > until:
                self.say(f"{self._options.minutes:g} minutes are over")
                return
            storm.check_running()
            storm.strike(fault)

    # The calm answers

    def _answer_calmly(self, specs: list[Spec], *, stop: bool = True) -> list[Spec]:
        """Each by one peer and again by three, which must agree; then half of them once more, with a stop string."""
        names = list(self._mesh.hosts)
        with ThreadPoolExecutor(2) as pool:
            first = list(pool.map(lambda spec: self._calm_answer(names[0], spec, f"{names[0]}:0-30"), specs))
            split = list(pool.map(lambda spec: self._calm_answer(names[1], spec, stages_over(names[:3], (10, 20))), specs))
            for spec, alone, among in zip(specs, first, split, strict=True):
                self._calm[spec.name] = alone
                for difference in among.same_as(alone):
                    self._wrong(f"{spec.name}, calm, over three peers and over one: {difference}")
            stopped = [found for spec in specs[::2] if stop and (found := with_stop(spec, self._calm[spec.name]))]
            for spec, answer in zip(stopped, pool.map(lambda spec: self._calm_answer(names[0], spec, ""), stopped), strict=True):
                self._calm[spec.name] = answer
        tokens = sum(len(self._calm[spec.name].times) for spec in [*specs, *stopped])
        self.say(f"calm: {len(specs) + len(stopped)} answers, {tokens} events")
        return [*specs, *stopped]

    def _calm_answer(self, at: str, spec: Spec, stages: str) -> Answer:
        answer = Answer(spec)
        ask(self._mesh.site, at, answer, {"stages": stages} if stages else {}, silence_s=_CALM_ANSWER_S)
        return answer

    # The verdict

    def _judge(self, asked: Asked) -> None:
        """Called by a client's thread for each answer that ended."""
        spec, answer = asked.answer.spec, asked.answer
        if any(answer.session in one.hit for one in self._storm.struck):
            asked.story = self._mesh.story(answer.session)
        if asked.problem:
            self._wrong(f"{spec.name} (session {answer.session}): {asked.problem}", asked)
        elif told := answer.same_as(self._calm[spec.name]):
            self._wrong(f"{spec.name} (session {answer.session}, over {answer.plan}): {'; '.join(told)}", asked)

    def _wrong(self, what: str, asked: Asked | None = None) -> None:
        self._problems.append(what)
        self.say(f"WRONG: {what}")
        if asked is not None and asked.answer.session:
            self.say(f"story of {asked.answer.session}:\n{self._mesh.told_story(asked.answer.session)}")

    def _tell(self, storm: Storm, crowd: Crowd) -> None:
        ended = crowd.ended
        print("\n".join(["", *table(storm.struck, ended), ""]))
        for pause, struck, asked in longest(storm.struck, ended, 5):
            print(f"  {pause:.2f} s in session {asked.answer.session} after fault {struck.fault.number}, {struck.fault.label}")
            self._write_story(pause, struck, asked)
        notes = [f"{one.fault.label}: {one.note}" for one in storm.struck if one.note]
        for note in sorted(set(notes)):
            print(f"  {note} ({notes.count(note)})")
        moved = sum(asked.resumed > 0 for asked in ended)
        anew = sum(asked.anew for asked in ended)
        tokens = sum(len(asked.answer.times) for asked in ended)
        print(f"{len(ended)} answers of {tokens} events ended, {moved} of them after their client had turned to another peer;")
        print(f"{anew} were asked anew, since nothing of them had come; a token each {1000 * usual_gap_s(ended):.0f} ms as a rule")
        print("clients were told: " + (", ".join(f"{what} ({count})" for what, count in sorted(crowd.told.items())) or "nothing"))

    def _write_story(self, pause: float, struck: Struck, asked: Asked) -> None:
        """Beside the logs: tokens in seconds since the fault, the story in its own time."""
        lines = [f"{pause:.2f} s after fault {struck.fault.number}, {struck.fault.label}: {asked.answer.spec.name}"]
        lines += [f"event {at - struck.at:8.3f} s" for at in asked.answer.times]
        with (self._folder / f"story-{asked.answer.session}.txt").open("w") as file:
            file.write("\n".join([*lines, *map(json.dumps, asked.story)]) + "\n")

    def _look_what_is_left(self, calm: dict[str, Reading]) -> None:
        self.say(f"resting for {_REST_S:.0f} s")
        time.sleep(_REST_S)
        now = read_all(self._mesh)
        for name, reading in now.items():
            self.say(f"after: {name} ({self._mesh[name].starts} starts): {reading}")
        for leak in leaks(calm, now):
            self._wrong(leak)
        for host in self._mesh:
            for line in host.log.read_text(errors="replace").splitlines():
                if "level=error" in line or "Traceback" in line:
                    self._wrong(f"{host.name} logged: {line[:500]}")


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: a new one")
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=90.0, help="no new fault after so long")
    parser.add_argument("--short", action="store_true", help="fewer and shorter requests, for a run of a minute")
    parser.add_argument("--keep", type=Path, help="where the daemons' logs go; by default they are kept only if something is wrong")
    options = parser.parse_args()
    if options.peers < 5:
        parser.error("three peers must be well while two are struck: at least 5")
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
    verdict = f"{len(problems)} things are wrong" if problems else "nothing wrong, lost, repeated or left behind"
    print(f"seed {options.seed}: {verdict}", flush=True)
    return 1 if problems else 0


def _run(options: argparse.Namespace, folder: Path) -> list[str]:
    pull_model()
    site, why_not = make_site(options.peers)
    where = f"{options.peers} hosts in network namespaces" if not why_not else f"processes only, links are left alone: {why_not}"
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
