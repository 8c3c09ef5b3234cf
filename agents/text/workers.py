"""Schedules text jobs over at most two worker processes, so that no model, template or text holds up the others for long.

A job is *risky* if it may take long: the first load of a model, a long text, or anything of a model whose last job took too long.
Only one risky job runs at a time, so a second process is always there for the others. A job that is not risky has little time;
if that is not enough, it becomes risky and is done once more with more time.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any, TypeAlias, TypeVar

from meshd.agents.text.process import WorkerEnded, WorkerProcess
from meshd.errors import InvalidRequest, MeshdError, ModelFileError, Overloaded, Unavailable
from meshd.models.text.worker.messages import EncodeChat, Encoded, EncodeText, Failed, Load, Loaded, Result
from meshd.types import ModelId

log = getLogger(__name__)

MAX_WAITING, MAX_RISKY_WAITING = 128, 32
"""Jobs that may wait, and risky ones among them. One more is refused. So risky ones leave room for those that are done at once."""
MAX_PROCESSES = 2
SHORT_BYTES = 64 << 10
"""A text up to this size is encoded within milliseconds, unless its tokenizer or template is at fault."""
SHORT_S = 1.0
LONG_S = 5.0
LONG_S_PER_MIB = 5.0
"""Processor time of a job that is not risky; of one that is, with more for each MiB of its text (1 s on a desktop processor)."""
LOAD_S = 30.0
"""Processor time for reading a tokenizer. Gemma's, with 262,144 tokens, takes 2 to 3 s on a desktop processor."""
DISTRUST_S = 600.0
"""How long a model's jobs count as risky after one of them ended its worker."""
FORGIVE_S = 60.0
"""How long a model whose loading ended a worker is not loaded again."""
MAX_REMEMBERED = 256
KEEP_S = 600.0
"""How long the last worker is kept without a job. The next one costs the reading of the tokenizer."""
KEEP_SECOND_S = 30.0
MEMORY_BYTES, LEAST_MEMORY_BYTES = 2 << 30, 768 << 20
"""Memory limit of a worker: half of the device's memory within these. Gemma's tokenizer takes 0.5 GiB while it is read."""
MAX_MODELS = 4
FULL_BYTES = 1 << 30
"""A worker that has MAX_MODELS models or uses more memory than this is replaced before it loads another model or does a risky job,
so that what earlier jobs left behind brings no job near the limit."""

_Value = TypeVar("_Value")
Source: TypeAlias = Callable[[], Awaitable[str | bytes]]
"""Finds a model's file: its path, or the bytes of its header. Raises: MeshdError."""


@dataclass(frozen=True, slots=True)
class TextModel:
    """A model whose text can be loaded: how errors name it, and where its file is."""

    id: ModelId
    name: str
    source: Source = field(compare=False)


@dataclass(slots=True, eq=False)
class _Job:
    model: TextModel
    make: Callable[[float], EncodeText | EncodeChat] | None
    """Makes the job from the processor time that it may take. None: load the model."""
    long_s: float
    risky: bool
    result: "asyncio.Future[Result]"
    file: str | bytes | None = None
    """What the model's source gave; None: not asked yet."""
    loading: bool = False
    """Whether the worker is reading the model now."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A worker process and its present job."""

    process: WorkerProcess | None = None
    job: _Job | None = None
    models: set[ModelId] = field(default_factory=set)
    idle_timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class TextWorkers:
    """Owns the text workers of this peer. They are started when there are jobs, and ended after some time without one."""

    memory_bytes: int = MEMORY_BYTES
    _slots: list[_Slot] = field(default_factory=list)
    _waiting: list[_Job] = field(default_factory=list)
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)
    _distrusted: OrderedDict[ModelId, float] = field(default_factory=OrderedDict)
    """Models of which a job ended its worker, and until when their jobs are risky."""
    _broken: OrderedDict[ModelId, tuple[float, ModelFileError]] = field(default_factory=OrderedDict)
    """Models whose loading ended its worker, and until when it is not tried again."""
    _closed: bool = False

    async def load(self, model: TextModel) -> Loaded:
        """Read a model's tokenizer and template. Returns: how its tokens are decoded.

        Raises: ModelFileError if they can't be used, or if reading them takes too long or too much memory; Overloaded.
        """
        result = await self._do(model, None, LOAD_S, risky=True)
        assert isinstance(result, Loaded)
        return result

    async def encode_text(self, model: TextModel, text: str) -> tuple[int, ...]:
        """Encode a text to token ids, with the tokens that the model expects around it.

        Raises: InvalidRequest, also if that takes too long or too much memory; ModelFileError; Overloaded.
        """
        return await self._encode(model, len(text), lambda s: EncodeText(model=model.id, text=text, cpu_s=s))

    async def encode_chat(self, model: TextModel, messages: list[dict[str, Any]], variables: dict[str, Any]) -> tuple[int, ...]:
        """Render a conversation with the model's chat template, and encode it to token ids. `variables` are the template's.

        Raises: InvalidRequest, also if that takes too long or too much memory; ModelFileError; Overloaded.
        """
        size = sum(len(str(message.get("content", ""))) for message in messages) + len(messages) * 64
        return await self._encode(
            model, size, lambda s: EncodeChat(model=model.id, messages=messages, variables=variables, cpu_s=s)
        )

    def forget(self, model: ModelId) -> None:
        """Load a model anew before its next job: what its file was read from is no longer trusted."""
        self._broken.pop(model, None)
        for slot in self._slots:
            slot.models.discard(model)

    async def close(self) -> None:
        """End all workers and refuse further jobs. Jobs that wait or run fail with Unavailable."""
        self._closed = True
        for job in self._waiting:
            _fail(job, _closing())
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in list(self._slots):
            await _end(slot)
        self._slots.clear()

    async def _encode(self, model: TextModel, size: int, make: Callable[[float], EncodeText | EncodeChat]) -> tuple[int, ...]:
        result = await self._do(model, make, LONG_S + LONG_S_PER_MIB * size / (1 << 20), risky=size > SHORT_BYTES)
        assert isinstance(result, Encoded)
        return result.tokens()

    async def _do(
        self, model: TextModel, make: Callable[[float], EncodeText | EncodeChat] | None, long_s: float, *, risky: bool
    ) -> Result:
        """Queue a job and wait for its result. Cancel: a job that waits is dropped; one that runs is finished in vain."""
        loop = asyncio.get_running_loop()
        file = None
        if make is None or not any(model.id in slot.models for slot in self._slots):
            until, error = self._broken.get(model.id, (0.0, None))
            if error is not None and until > loop.time():
                raise error
            file = await model.source()  # before the job is queued: a header may have to come from another peer
        risky = risky or self._distrusted.get(model.id, 0.0) > loop.time()
        self._check_room(risky)
        job = _Job(model, make, long_s, risky, loop.create_future(), file)
        self._waiting.append(job)
        self._dispatch()
        try:
            result = await job.result
        finally:
            with suppress(ValueError):
                self._waiting.remove(job)
        if isinstance(result, Failed):
            raise result.error()
        return result

    def _check_room(self, risky: bool) -> None:
        """Check that one more job may wait. Raises: Overloaded; Unavailable after `close`."""
        if self._closed:
            raise _closing()
        waiting = sum(job.risky for job in self._waiting) if risky else len(self._waiting)
        if waiting >= (MAX_RISKY_WAITING if risky else MAX_WAITING):
            raise Overloaded(f"{waiting} prompts wait to be encoded", hint="try again in a moment")

    def _dispatch(self) -> None:
        """Give waiting jobs to workers that are free, the oldest first."""
        for job in list(self._waiting):
            slot = self._free_slot(job)
            if slot is None:
                continue
            self._waiting.remove(job)
            slot.job = job
            if slot.idle_timer is not None:
                slot.idle_timer.cancel()
            task = asyncio.get_running_loop().create_task(self._run(slot, job), name=f"text of {job.model.name}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _free_slot(self, job: _Job) -> _Slot | None:
        """Choose a worker for a job. Returns: None if it must wait."""
        busy = [slot.job for slot in self._slots if slot.job is not None]
        if job.risky and any(other.risky for other in busy):
            return None
        free = [slot for slot in self._slots if slot.job is None]
        having = [slot for slot in free if job.model.id in slot.models]
        if having:
            return having[0]
        may_start = len(self._slots) < MAX_PROCESSES
        # A risky job may end its worker, so it gets one without other models where it can. One that is not risky waits for
        # the worker that will soon be free: a second one is started only where the first has a risky job.
        if job.risky and may_start and not any(not slot.models for slot in free):
            return self._new_slot()
        if free:
            return min(free, key=lambda slot: len(slot.models))
        return self._new_slot() if may_start and all(other.risky for other in busy) else None

    def _new_slot(self) -> _Slot:
        slot = _Slot()
        self._slots.append(slot)
        return slot

    async def _run(self, slot: _Slot, job: _Job) -> None:
        try:
            result = await self._result(slot, job)
            if not job.result.done():
                job.result.set_result(result)
        except WorkerEnded as ended:
            slot.process = None
            self._after_death(job, ended)
        except MeshdError as error:
            _fail(job, error)
        except BaseException:  # `close` cancelled this task, or there is a bug: in no case may the request wait for ever
            _fail(job, _closing())
            raise
        finally:
            slot.job = None
            self._rest(slot)
            if not self._closed:
                self._dispatch()

    async def _result(self, slot: _Slot, job: _Job) -> Result:
        """Do a job in a slot's process. A model that the process lacks is loaded there first."""
        absent = job.make is None or job.model.id not in slot.models
        process = await self._process(slot, clean=absent or job.risky)
        if absent or job.model.id not in slot.models:
            result = await self._load(process, job)
            if isinstance(result, Failed):
                return result
            slot.models.add(job.model.id)
            if job.make is None:
                return result
        return await process.do(job.make(job.long_s if job.risky else SHORT_S))  # type: ignore[misc]  # `absent` covers None

    async def _load(self, process: WorkerProcess, job: _Job) -> Result:
        file = job.file if job.file is not None else await job.model.source()
        path, header = (file, b"") if isinstance(file, str) else ("", file)
        job.loading = True
        result = await process.do(Load(model=job.model.id, path=path, header=header, cpu_s=LOAD_S))
        job.loading, job.file = False, None
        return result

    async def _process(self, slot: _Slot, *, clean: bool) -> WorkerProcess:
        """Get a slot's process. It is started if there is none or if it ended, and replaced if it is full and `clean` is set."""
        process = slot.process
        if process is not None and process.running:
            if not clean or (len(slot.models) < MAX_MODELS and process.resident_bytes() < FULL_BYTES):
                return process
            await process.kill()
        try:
            slot.process, slot.models = await WorkerProcess.start(self.memory_bytes), set()
        except OSError as error:
            raise Unavailable(
                f"the prompt can't be encoded now: the system starts no process for it ({error.strerror or error})",
                hint="end other programs, or raise the limits of processes and open files",
            ) from error
        return slot.process

    def _after_death(self, job: _Job, ended: WorkerEnded) -> None:
        """Queue a short job once more, as a risky one. Report the failure of any other job."""
        now, name = asyncio.get_running_loop().time(), job.model.name
        _remember(self._distrusted, job.model.id, now + DISTRUST_S)
        if job.loading or job.make is None:
            error = ModelFileError(
                f"the tokenizer and chat template of {name} can't be used: reading them failed, since {ended}",
                hint="choose another file of this model",
            )
            _remember(self._broken, job.model.id, (now + FORGIVE_S, error))
            log.warning("%s", error)
            _fail(job, error)
        elif job.result.done():
            return  # the request has gone
        elif not job.risky and not self._closed:
            job.risky = True
            self._waiting.insert(0, job)
        else:
            log.warning("a prompt for %s was not encoded: %s", name, ended)
            _fail(
                job,
                InvalidRequest(
                    f"the prompt can't be encoded by the tokenizer and chat template of {name}: {ended}",
                    param="messages" if isinstance(job.make(0.0), EncodeChat) else "prompt",
                    hint="send a shorter prompt, or use another model",
                ),
            )

    def _rest(self, slot: _Slot) -> None:
        """Let a worker without a job end after some time. Forget one that has ended."""
        if slot.process is None or not slot.process.running:
            self._slots.remove(slot)
            return
        keep_s = KEEP_S if len(self._slots) == 1 else KEEP_SECOND_S
        slot.idle_timer = asyncio.get_running_loop().call_later(keep_s, self._expire, slot)

    def _expire(self, slot: _Slot) -> None:
        if slot.job is None and slot in self._slots:
            self._slots.remove(slot)
            task = asyncio.get_running_loop().create_task(_end(slot), name="end an idle text worker")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


def memory_limit(device_bytes: int) -> int:
    """Choose a worker's memory limit for a device with so much memory. In bytes."""
    return max(LEAST_MEMORY_BYTES, min(MEMORY_BYTES, device_bytes // 2))


async def _end(slot: _Slot) -> None:
    if slot.idle_timer is not None:
        slot.idle_timer.cancel()
    if slot.process is not None:
        await slot.process.kill()


def _fail(job: _Job, error: MeshdError) -> None:
    if not job.result.done():
        job.result.set_exception(error)
        job.result.exception()  # the request may have gone: then nobody else reads it


def _closing() -> Unavailable:
    return Unavailable("this peer is about to stop and takes no new requests", hint="ask another peer")


def _remember(known: "OrderedDict[ModelId, _Value]", model: ModelId, value: _Value) -> None:
    """Remember a model, and forget the oldest beyond `MAX_REMEMBERED`."""
    known[model] = value
    known.move_to_end(model)
    while len(known) > MAX_REMEMBERED:
        known.popitem(last=False)
