"""Real text workers: what no tokenizer, template or text can do to the process that asks them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from in_process.peers import until
from meshd.agents.text import workers as module
from meshd.agents.text.workers import MAX_PROCESSES, TextModel, TextWorkers, memory_limit
from meshd.errors import InvalidRequest, ModelFileError, Overloaded, Unavailable
from meshd.types import ModelId
from texts.headers import PLAIN, hostile_tokenizer, text_header

HI = [{"role": "user", "content": "the fox"}]
FREEZE = "{% set a = 'a' * 20000000 %}{{ a.rfind('a' * 500000 ~ 'b' ~ 'a' * 500000) }}"
ON_DEMAND = "{% if messages[0].content == 'freeze' %}" + FREEZE + "{% endif %}" + PLAIN


def model(name: str, header: bytes) -> TextModel:
    async def source() -> bytes:
        return header

    return TextModel(ModelId(name), name, source)


@pytest.fixture
async def workers() -> AsyncIterator[TextWorkers]:
    started = TextWorkers(memory_bytes=1 << 30)
    yield started
    await started.close()
    assert pids() == []


def pids() -> list[int]:
    """Return the ids of this process's text workers."""
    return [child.pid for child in psutil.Process().children() if "meshd.models.text.worker" in _command(child)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


async def until_none_is_left() -> None:
    await until(lambda: not pids())


async def test_prompts_are_encoded_in_a_worker_that_is_started_by_the_first_of_them(workers: TextWorkers) -> None:
    good = model("good", text_header())
    assert pids() == []
    loaded = await workers.load(good)
    table = loaded.table()
    assert loaded.chats
    assert len(pids()) == 1
    tokens = await workers.encode_chat(good, HI, {})
    assert table.decode(tokens, skip_special=False) == "<|im_start|>the fox<|im_end|>"
    assert [table.token_bytes(id_) for id_ in tokens if table.is_control(id_)] == [b"<|im_start|>", b"<|im_end|>"]
    assert table.decode(await workers.encode_text(good, "the fox")) == "the fox"
    assert len(pids()) == 1


@pytest.mark.parametrize("status", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_worker_that_was_killed_is_started_again(workers: TextWorkers, status: signal.Signals) -> None:
    good = model("good", text_header())
    before = await workers.encode_text(good, "the fox")
    [pid] = pids()
    os.kill(pid, status)
    assert await workers.encode_text(good, "the fox") == before
    assert pid not in pids()


HOSTILE_FILES: dict[str, Callable[[], bytes]] = {
    "a tokenizer that makes ten gigabytes of one character": hostile_tokenizer,
    "a template of 20,000 branches": lambda: text_header("{% if a %}" + "{% elif a %}" * 20000 + "{% endif %}"),
    "a template that never ends": lambda: text_header("{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2),
    "a template that searches for ever": lambda: text_header(FREEZE),
    "a template that divides long numbers": lambda: text_header(
        "{% set a = ('f' * 8000000) | int(base=16) %}{{ (a // ('f' * 4000000) | int(base=16)) > 0 }}"
    ),
    "a template that grows": lambda: text_header("{{ 'x' * 10 ** 10 }}"),
    "a template that grows its lists": lambda: text_header(
        "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("what", HOSTILE_FILES)
async def test_a_hostile_model_is_refused_while_others_are_served(
    workers: TextWorkers, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOAD_S", 1.0)
    good, hostile = model("good", text_header()), model("hostile", HOSTILE_FILES[what]())
    wanted = await workers.encode_text(good, "the fox")
    loading = asyncio.create_task(workers.load(hostile))
    await asyncio.sleep(0)
    assert await workers.encode_text(good, "the fox") == wanted
    with pytest.raises(ModelFileError, match=r"of hostile can't be used: .* takes more than|template can't be used: "):
        await loading
    assert await workers.encode_text(good, "the fox") == wanted


async def test_a_prompt_that_takes_too_long_is_refused_and_others_are_served_meanwhile(
    workers: TextWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORT_S", 0.3)
    monkeypatch.setattr(module, "LONG_S", 1.0)
    good, hostile = model("good", text_header()), model("hostile", text_header(ON_DEMAND))
    wanted = await workers.encode_text(good, "the fox")
    await workers.encode_chat(hostile, HI, {})
    freezing = asyncio.create_task(workers.encode_chat(hostile, [{"role": "user", "content": "freeze"}], {}))
    served = 0
    while not freezing.done():
        assert await workers.encode_text(good, "the fox") == wanted
        served += 1
    assert served > 1
    with pytest.raises(InvalidRequest, match="takes more than 1 s") as caught:
        await freezing
    assert caught.value.param == "messages"
    assert "shorter prompt" in caught.value.hint
    assert await workers.encode_chat(hostile, HI, {}), "the model itself stays usable"


async def test_a_long_run_of_spaces_is_encoded_and_does_not_hold_up_short_prompts(
    workers: TextWorkers,
) -> None:
    good = model("good", text_header())
    wanted = await workers.encode_text(good, "the fox")
    long = asyncio.create_task(workers.encode_text(good, " " * 1_500_000))
    order = []
    long.add_done_callback(lambda _: order.append("long"))
    assert await workers.encode_text(good, "the fox") == wanted
    order.append("short")
    tokens = await long
    assert order == ["short", "long"]
    assert tokens


async def test_there_are_never_more_than_two_processes_and_every_job_gets_one(workers: TextWorkers) -> None:
    models = [model(f"m{number}", text_header()) for number in range(6)]
    jobs = [asyncio.create_task(workers.load(each)) for each in models]
    jobs += [asyncio.create_task(workers.encode_text(models[0], "the fox " * count)) for count in (1, 20_000, 2, 3)]
    most = 0
    while not all(job.done() for job in jobs):
        most = max(most, len(pids()))
        await asyncio.sleep(0.01)
    assert most <= MAX_PROCESSES
    assert all(job.exception() is None for job in jobs)


async def test_jobs_that_wait_are_bounded(workers: TextWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    good = model("good", text_header())
    jobs = [asyncio.create_task(workers.encode_text(good, "the fox")) for _ in range(9)]
    outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
    assert len(refused) == 5, "one runs, three wait"
    assert "wait to be encoded" in refused[0].message


async def test_risky_jobs_that_wait_leave_room_for_others(workers: TextWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RISKY_WAITING", 2)
    good = model("good", text_header())
    wanted = await workers.encode_text(good, "the fox")
    long = [asyncio.create_task(workers.encode_text(good, "the fox " * 200_000)) for _ in range(6)]
    await asyncio.sleep(0)
    assert await workers.encode_text(good, "the fox") == wanted
    outcomes = await asyncio.gather(*long, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [tuple] * 3 + [Overloaded] * 3, "one runs, two wait"


async def test_a_request_that_has_gone_leaves_the_queue(workers: TextWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 1)
    good = model("good", text_header())
    first = asyncio.create_task(workers.load(good))
    waiting = asyncio.create_task(workers.encode_text(good, "the fox"))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await workers.encode_text(good, "a") != ()
    await first


async def test_a_model_that_ended_a_worker_is_not_loaded_again_at_once(
    workers: TextWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = model("hostile", hostile_tokenizer())
    for _ in range(2):
        with pytest.raises(ModelFileError, match="choose another file"):
            await workers.load(hostile)
        assert pids() == []
    monkeypatch.setattr(workers, "_broken", type(workers._broken)())
    good = text_header()

    async def mended() -> bytes:
        return good

    assert (await workers.load(TextModel(hostile.id, "mended", mended))).chats


async def test_a_broken_file_names_its_fault_and_ends_no_worker(workers: TextWorkers, tmp_path: Path) -> None:
    await workers.load(model("good", text_header()))
    before = pids()
    with pytest.raises(ModelFileError, match="chat template can't be used"):
        await workers.load(model("cut", text_header("{% for m in %}")))

    async def gone() -> str:
        return str(tmp_path / "gone.gguf")

    with pytest.raises(ModelFileError, match=r"gone\.gguf can't be opened"):
        await workers.load(TextModel(ModelId("gone"), "gone", gone))
    assert set(before) <= set(pids())


async def test_text_that_can_not_be_sent_is_the_requests_fault(workers: TextWorkers) -> None:
    good = model("good", text_header())
    with pytest.raises(InvalidRequest, match="surrogates not allowed at character 1"):
        await workers.encode_text(good, "a\ud800")
    with pytest.raises(InvalidRequest, match="can't be encoded"):
        await workers.encode_chat(good, HI, {"number": 1 << 70})
    with pytest.raises(InvalidRequest, match="can't be set"):
        await workers.encode_chat(good, HI, {"messages": []})
    assert await workers.encode_text(good, "a")


async def test_idle_workers_end(workers: TextWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_S", 0.05)
    good = model("good", text_header())
    before = await workers.encode_text(good, "the fox")
    await until_none_is_left()
    assert await workers.encode_text(good, "the fox") == before


async def test_closing_ends_what_runs_and_what_waits() -> None:
    workers = TextWorkers(memory_bytes=1 << 30)
    hostile, good = model("hostile", text_header(FREEZE)), model("good", text_header())
    jobs = [asyncio.create_task(workers.load(hostile)), asyncio.create_task(workers.load(good))]
    await until(lambda: bool(pids()))
    await workers.close()
    outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
    assert pids() == []
    with pytest.raises(Unavailable):
        await workers.load(good)


async def test_a_worker_ignores_the_interrupt_of_the_terminal_and_ends_when_its_daemon_is_gone(workers: TextWorkers) -> None:
    good = model("good", text_header())
    await workers.load(good)
    [pid] = pids()
    assert os.getsid(pid) != os.getsid(0)
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    assert await workers.encode_text(good, "the fox")
    assert pids() == [pid]
    process = workers._slots[0].process
    assert process is not None
    assert process._process.stdin is not None
    process._process.stdin.close()
    await until_none_is_left()


async def test_a_worker_with_many_models_is_replaced(workers: TextWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MODELS", 2)
    seen = set()
    for number in range(5):
        await workers.load(model(f"m{number}", text_header()))
        seen |= set(pids())
        assert all(len(slot.models) <= 2 for slot in workers._slots)
    assert len(seen) >= 3


def test_the_memory_limit_follows_the_device() -> None:
    assert memory_limit(1 << 30) == 768 << 20
    assert memory_limit(3 << 30) == 3 << 29
    assert memory_limit(64 << 30) == 2 << 30
