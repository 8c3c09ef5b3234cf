"""Answers of real daemons while all connections between them are reset again and again: same tokens, and no epoch is spent."""

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from real_daemons.cabled import CabledSite
from real_daemons.mesh import Mesh, pull_model, running
from real_daemons.streams import Answer, Spec, ask

COORDINATOR, FIRST, SECOND = "h1", "h2", "h3"
STAGES = f"{FIRST}:0-14,{SECOND}:14-30"
OTHER_WAY = f"{SECOND}:0-14,{FIRST}:14-30"
SILENCE_S = 20.0
EVERY_S = 1.2
"""Longer than a broken link is dialled: each reset finds all links up again, also on a busy machine."""


def spec(prompt: str = "Tell me a long story about a lighthouse keeper and her cat.", **fields: object) -> Spec:
    body = {
        "model": "smollm2:135m",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0.8,
        "seed": 11,
        "repetition_penalty": 1.05,
        "max_tokens": 120,
        "ignore_eos": True,
        "logprobs": True,
        "stream_options": {"include_usage": True},
    }
    return Spec("story", "/v1/chat/completions", body | fields)


LONG = spec(prompt="A cat. " * 250, max_tokens=20)


@pytest.fixture(scope="module")
def site() -> CabledSite:
    return CabledSite(3)


@pytest.fixture(scope="module")
def mesh(site: CabledSite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    pull_model()
    with running(site, tmp_path_factory.mktemp("flaps"), ("--copies", "1")) as mesh:
        for host in (FIRST, SECOND):
            mesh.place(COORDINATOR, f"{host}:0-30", 2048)
        yield mesh


def read(mesh: Mesh, answer: Answer, **options: object) -> Answer:
    ask(mesh.site, COORDINATOR, answer, {"stages": STAGES} | options, silence_s=SILENCE_S)
    return answer


def under_flaps(mesh: Mesh, site: CabledSite, answers: list[Answer], options: list[dict[str, object]]) -> None:
    """Read answers at the same time, and reset all connections every `EVERY_S` until they have ended."""
    readers = [
        threading.Thread(target=read, args=(mesh, answer), kwargs=given) for answer, given in zip(answers, options, strict=True)
    ]
    for reader in readers:
        reader.start()
    snaps = 0
    while any(reader.is_alive() for reader in readers):
        time.sleep(EVERY_S)
        snaps += site.snap() > 0
    assert snaps >= 2


def changes_of_plan(mesh: Mesh, answer: Answer) -> list[dict[str, Any]]:
    return [
        line for line in mesh.story(answer.session) if line["what"] in ("lost", "failed", "goes on") or line.get("epoch", 1) != 1
    ]


@pytest.mark.parametrize("options", [{}, {"mirror": True}], ids=["plain", "mirrored"])
def test_an_answer_goes_on_in_its_epoch(mesh: Mesh, site: CabledSite, options: dict[str, object]) -> None:
    undisturbed, answer = read(mesh, Answer(spec()), **options), Answer(spec())
    under_flaps(mesh, site, [answer], [options])
    assert answer.differences_from(undisturbed) == []
    assert changes_of_plan(mesh, answer) == []
    [restores] = re.findall(r"^meshd_link_restores_total (\S+)$", mesh[FIRST].get("/metrics"), re.MULTILINE)
    assert float(restores) > 0


def test_a_long_prompt_arrives_whole(mesh: Mesh, site: CabledSite) -> None:
    undisturbed, answer = read(mesh, Answer(LONG)), Answer(LONG)
    under_flaps(mesh, site, [answer], [{}])
    assert answer.differences_from(undisturbed) == []
    assert changes_of_plan(mesh, answer) == []


def test_sessions_in_opposite_directions_go_on_in_their_epochs(mesh: Mesh, site: CabledSite) -> None:
    undisturbed = read(mesh, Answer(spec()))
    answers = [Answer(spec()) for _ in range(2)]
    under_flaps(mesh, site, answers, [{"stages": stages} for stages in (STAGES, OTHER_WAY)])
    for answer in answers:
        assert answer.differences_from(undisturbed) == []
        assert changes_of_plan(mesh, answer) == []
