"""An answer has the same tokens and logprobs, to the last bit, in whatever way the mesh computes it.

Each way runs with real daemons and SmolLM2: alone on one peer, among 15 others, over three and four peers, with guesses that are
rolled back, with a mirror that takes over right after a rollback, moved in mid-answer, and drained. `make same-answers` compares
the answers to 20 prompts, greedy and sampled, of 128 tokens and more.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from real_daemons.mesh import Mesh, pull_model, running
from real_daemons.sites import LocalSite
from real_daemons.streams import Answer, Spec, Streaming, ask
from texts.prompts import PROMPTS, SENTENCE

DAEMON = Path(__file__).parents[2] / "lib/real_daemons/guessing_daemon.py"
COORDINATOR, FIRST, SECOND, SPARE = "h1", "h2", "h3", "h4"
ALONE = f"{COORDINATOR}:0-30"
TWO = f"{FIRST}:0-14,{SECOND}:14-30"
THREE = f"{FIRST}:0-10,{SECOND}:10-20,{SPARE}:20-30"
UNEVEN = f"{SECOND}:0-3,{COORDINATOR}:3-14,{SPARE}:14-15,{FIRST}:15-30"
CONTEXT = 8192
AT_ONCE = 8
SILENCE_S = 120.0


@dataclass(frozen=True)
class Form:
    """How much a run compares."""

    prompts: tuple[int, ...]
    tokens: int
    """Tokens of the shortest answer."""
    disturbed_after: int
    """Number of tokens of each answer after which a way that disturbs answers does so, at the latest when one is half done."""


SHORT = {"onnxruntime": Form((1, 4), 48, 8), "torch": Form((4,), 24, 4)}
LONG = Form(tuple(range(20)), 128, 40)


@dataclass
class Ways:
    """The answers of one mesh to the requests of one form."""

    mesh: Mesh
    form: Form
    alone: dict[str, Answer] = field(default_factory=dict)
    """Answers of a peer that had nothing else to do, by the name of the request."""

    @property
    def specs(self) -> list[Spec]:
        return [spec_of(number, self.form.tokens, sampled=sampled) for number in self.form.prompts for sampled in (False, True)]

    def guess(self, mode: str) -> None:
        """Choose how the sessions that begin from now on guess. See `guessing_daemon`."""
        (self.mesh.root / "guesses/mode").write_text(mode)

    def steps(self) -> list[list[int]]:
        """Return the number of tokens and of guesses of each answered step with guesses since the last call."""
        file = self.mesh.root / "guesses/steps"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [[int(word) for word in line.split()] for line in lines]

    def one_by_one(self) -> list[Answer]:
        """Ask for all answers. Two peers each compute one at a time, alone."""

        def half(name: str, specs: list[Spec]) -> list[Answer]:
            answers = [Answer(spec) for spec in specs]
            for answer in answers:
                ask(self.mesh.site, name, answer, {"stages": f"{name}:0-30"}, silence_s=SILENCE_S)
            return answers

        with ThreadPoolExecutor(2) as pool:
            halves = pool.map(half, (COORDINATOR, FIRST), (self.specs[::2], self.specs[1::2]))
        return [answer for each in halves for answer in each]

    def together(self, stages: str, at_once: int) -> list[Answer]:
        """Ask for all answers, `at_once` of them at a time."""

        def one(spec: Spec) -> Answer:
            answer = Answer(spec)
            ask(self.mesh.site, COORDINATOR, answer, {"stages": stages}, silence_s=SILENCE_S)
            return answer

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, self.specs))

    def disturbed(
        self, disturb: Callable[[list[Streaming]], object], heal: Callable[[], object] = lambda: None, **options: Any
    ) -> list[Answer]:
        """Ask for all answers over two peers, some at a time. In the middle of these call `disturb`, and after their end `heal`."""
        specs = sorted(self.specs, key=lambda spec: len(spec.body["prompt"]))  # those that run together begin at much the same time
        answers = list[Answer]()
        mesh = {"stages": TWO, **options}
        for begin in range(0, len(specs), AT_ONCE):
            group = [
                Streaming(self.mesh.site, COORDINATOR, spec, mesh, silence_s=SILENCE_S) for spec in specs[begin : begin + AT_ONCE]
            ]
            self._wait([streaming.answer for streaming in group])
            disturb(group)
            answers += [streaming.end() for streaming in group]
            heal()
        return answers

    def _wait(self, answers: list[Answer]) -> None:
        """Wait until it is time to disturb these answers."""
        until = time.monotonic() + SILENCE_S
        while not all(len(answer.tokens) >= self.form.disturbed_after for answer in answers):
            assert time.monotonic() < until, f"tokens arrived: {[len(answer.tokens) for answer in answers]}"
            if all(answer.session for answer in answers) and any(len(a.tokens) > self.form.tokens / 2 for a in answers):
                return
            time.sleep(0.002)

    def check(self, answers: Sequence[Answer]) -> None:
        """Compare tokens, logprobs, text and usage with those of the same request alone."""
        found = [(answer.spec.name, answer.plan, answer.differences_from(self.alone[answer.spec.name])) for answer in answers]
        print(f"{sum(len(answer.tokens) for answer in answers)} tokens of {len(answers)} answers compared")
        assert len(answers) == len(self.alone)
        assert [each for each in found if each[2]] == []

    def methods(self, answers: Sequence[Answer]) -> list[str]:
        """Return the methods by which the answers continued after a change of plan."""
        return [line["method"] for answer in answers for line in self.mesh.story(answer.session) if line["what"] == "goes on"]


def spec_of(number: int, tokens: int, *, sampled: bool) -> Spec:
    """Make the request with one of the prompts. Every fifth prompt has 70 to 270 tokens, the others 3 to 14.

    Each request has another number of tokens, by which `guessing_daemon` knows it.
    """
    tokens += 2 * number + sampled
    longer = SENTENCE * (number + 1) if number % 5 == 4 else ""
    body: dict[str, Any] = {"model": "smollm2:135m", "prompt": longer + PROMPTS[number], "max_tokens": tokens, "ignore_eos": True}
    body |= {"logprobs": 5, "temperature": 0.0, "stream_options": {"include_usage": True}}
    if sampled:
        body |= {"temperature": 0.9, "top_p": 0.95, "seed": number}
        if number % 2:
            body |= {"frequency_penalty": 0.6, "presence_penalty": 0.3, "repetition_penalty": 1.1}
    return Spec(f"{'sampled' if sampled else 'greedy'} {number}", "/v1/completions", body)


@pytest.fixture(scope="module", params=["onnxruntime", pytest.param("torch", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def mesh(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    pull_model()
    root = tmp_path_factory.mktemp(backend)
    (root / "guesses").mkdir()
    (root / "guesses/mode").write_text("none")
    flags = ("--copies", "1", "--max-sessions", "16", "--backend", backend, "--drain-timeout", "0")
    with running(LocalSite(4), root, flags, entry=(str(DAEMON),)) as mesh:
        for host in mesh:
            place(mesh, host.name)
        yield mesh


def place(mesh: Mesh, name: str) -> None:
    mesh.place(COORDINATOR, f"{name}:0-30", CONTEXT)


@pytest.fixture(scope="module", params=["short", pytest.param("long", marks=pytest.mark.slow)])
def ways(mesh: Mesh, backend: str, request: pytest.FixtureRequest) -> Ways:
    """A mesh, and the answers of one peer alone to all requests, which are recorded for the guesses of the other ways."""
    ways = Ways(mesh, SHORT[backend] if request.param == "short" else LONG)
    ways.guess("record")
    ways.alone = {answer.spec.name: answer for answer in ways.one_by_one()}
    ways.guess("none")
    assert all(len(answer.tokens) == answer.spec.body["max_tokens"] for answer in ways.alone.values())
    return ways


pytestmark = pytest.mark.timeout(5400)  # for a hang only: each way of the long form takes some minutes


def test_among_fifteen_others(ways: Ways) -> None:
    ways.guess("none")
    ways.check(ways.together(ALONE, 16))


@pytest.mark.parametrize("stages", [THREE, UNEVEN], ids=["three peers", "four uneven stages"])
def test_split(ways: Ways, stages: str) -> None:
    ways.guess("none")
    ways.check(ways.together(stages, AT_ONCE))


@pytest.mark.parametrize("stages", [ALONE, THREE], ids=["one peer", "three peers"])
def test_with_guesses_that_are_rolled_back(ways: Ways, stages: str) -> None:
    ways.steps()
    ways.guess("mixed")
    ways.check(ways.together(stages, AT_ONCE))
    steps = ways.steps()
    assert sum(tokens == guesses + 1 for tokens, guesses in steps) >= len(ways.alone), "some steps had right guesses only"
    assert sum(tokens <= guesses for tokens, guesses in steps) >= len(ways.alone), "and some were rolled back"


def test_with_a_mirror_that_takes_over_right_after_a_rollback(ways: Ways) -> None:
    """Each step is rolled back, so whenever a peer is lost, that is right after a rollback."""
    mesh = ways.mesh

    def heal() -> None:
        mesh[SECOND].start()
        mesh.wait_until_all_see()
        mesh.place(COORDINATOR, TWO, CONTEXT)

    ways.steps()
    ways.guess("back")
    with only_placed(mesh, TWO, f"{FIRST}:0-14,{SPARE}:14-30"):
        answers = ways.disturbed(lambda group: mesh[SECOND].kill(), heal, mirror=True)
    ways.check(answers)
    steps = ways.steps()
    assert sum(tokens <= guesses for tokens, guesses in steps) > 0.9 * len(steps)
    methods = ways.methods(answers)
    assert len(methods) >= len(answers)
    if ways.form is LONG:  # a short answer may be lost before its copy has begun
        assert methods.count("mirror") >= len(answers) / 2, methods


@contextmanager
def only_placed(mesh: Mesh, *placements: str) -> Iterator[None]:
    """Inside the block, only these layers are placed.

    Where a peer had all of them, it might end an answer sooner than a copy would, by a new prefill.
    """
    mesh.place_only(COORDINATOR, CONTEXT, *placements)
    try:
        yield
    finally:
        for host in mesh:
            place(mesh, host.name)


@pytest.mark.parametrize("guesses", ["none", "mixed"])
def test_moved_in_mid_answer(ways: Ways, guesses: str) -> None:
    def move(group: list[Streaming]) -> None:
        def one(streaming: Streaming) -> None:
            body = {"session": streaming.answer.session, "source": SECOND, "target": SPARE}
            ways.mesh[COORDINATOR].post("/mesh/v1/migrate", body, SILENCE_S)

        with ThreadPoolExecutor(len(group)) as pool:
            list(pool.map(one, group))

    ways.guess(guesses)
    answers = ways.disturbed(move)
    ways.check(answers)
    for answer in answers:
        assert ways.methods([answer]) == ["mirror"], ways.mesh.story(answer.session)


def test_drained(ways: Ways) -> None:
    mesh = ways.mesh

    def drain(group: list[Streaming]) -> None:
        drained = mesh[COORDINATOR].post("/mesh/v1/drain", {"peer": FIRST, "timeout_s": 60.0}, SILENCE_S)
        assert drained["sessions_left"] == 0

    ways.guess("none")
    answers = ways.disturbed(drain, lambda: mesh[COORDINATOR].post("/mesh/v1/drain", {"peer": FIRST, "undo": True}))
    ways.check(answers)
    assert len(ways.methods(answers)) >= len(answers)
