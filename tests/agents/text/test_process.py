"""One text worker as the daemon sees it."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from meshd.agents.text.process import WorkerEnded, WorkerProcess
from meshd.models.text.worker.messages import EncodeChat, Encoded, EncodeText, Failed, Load, Loaded
from texts.headers import text_header

LOOP = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
CHAT = EncodeChat(model="m", messages=[{"role": "user", "content": "the"}], variables={}, cpu_s=1.0)


@pytest.fixture
async def process() -> AsyncIterator[WorkerProcess]:
    started = await WorkerProcess.start(1 << 30)
    yield started
    await started.kill()


def test_the_daemon_imports_neither_a_tokenizer_nor_a_template_library() -> None:
    script = (
        "import sys, meshd.daemon.daemon; print(*{'tokenizers', 'jinja2', 'meshd.models.text.worker.serve'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == ""


async def test_jobs_are_done_one_after_the_other(process: WorkerProcess) -> None:
    assert isinstance(await process.do(Load(model="m", header=text_header(), cpu_s=5)), Loaded)
    for _ in range(2):
        assert isinstance(await process.do(CHAT), Encoded)
        assert isinstance(await process.do(EncodeText(model="other", text="a", cpu_s=1)), Failed)
    assert process.running
    assert process.resident_bytes() > 1 << 20


async def test_a_worker_ends_when_a_job_takes_more_than_its_processor_time(process: WorkerProcess) -> None:
    with pytest.raises(WorkerEnded, match=r"takes more than 0\.3 s"):
        await process.do(Load(model="m", header=text_header(LOOP), cpu_s=0.3))
    assert not process.running
    assert process.resident_bytes() == 0


async def test_a_worker_ends_at_its_memory_limit() -> None:
    small = await WorkerProcess.start(256 << 20)
    with pytest.raises(WorkerEnded, match="more than 256 MiB of memory"):
        await small.do(Load(model="m", header=text_header("{{ 'x' * 10 ** 9 }}"), cpu_s=5))
    assert not small.running


async def test_a_worker_that_is_killed_says_so(process: WorkerProcess) -> None:
    job = asyncio.create_task(process.do(Load(model="m", header=text_header(LOOP), cpu_s=20)))
    await asyncio.sleep(0.1)
    await process.kill()
    with pytest.raises(WorkerEnded, match="ended with status -9"):
        await job


async def test_a_cancelled_job_ends_the_worker_since_its_result_would_be_taken_for_another(process: WorkerProcess) -> None:
    job = asyncio.create_task(process.do(Load(model="m", header=text_header(LOOP), cpu_s=20)))
    await asyncio.sleep(0.1)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    assert not process.running
