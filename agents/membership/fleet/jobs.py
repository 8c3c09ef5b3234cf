"""Jobs of devices that speak only MQTT: a sealed request comes in, the answer goes out as sealed chunks.

A device sends a job to one peer, so exactly one peer takes it. If that peer dies, the device asks another one to go on with the
answer, by the secret that the first chunk had. Only what was sealed with a valid key is answered, and a request counts only once.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from logging import getLogger
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from meshd.agents.membership.fleet.broker import Broker
from meshd.agents.membership.fleet.devices import DeviceList
from meshd.agents.membership.fleet.presence import Milliseconds
from meshd.agents.membership.fleet.sealing import Direction, JobSeal, key_check, read_sealed
from meshd.agents.membership.fleet.topics import REQUEST_BYTES, JobTopic, Topics
from meshd.agents.service import AnswerSecret, ChatMessage, Coordinator, Finished, Generation, GenerationRequest
from meshd.bounds import MAX_LABEL, MAX_STOP_CHARACTERS, AskedTemperature, Fraction, Seed, at_most
from meshd.clock import Clock
from meshd.errors import InvalidRequest, LocalFault, MeshdError, Overloaded, PeerLost, PeerRefused
from meshd.protocol.identity import ClusterKey, Identity
from meshd.types import MqttDevice, SamplingParams

log = getLogger(__name__)

MAX_AGE_S = 300.0
"""How far the date of a request may be from this peer's clock. A device without a clock takes the date from the peer's presence."""
MAX_RUNNING, MAX_PER_DEVICE = 8, 2
"""Jobs that run at the same time, in all and of one device. A further one is answered with an error."""
MAX_SEEN, MAX_SEEN_PER_DEVICE = 1024, 128
"""Requests that are remembered while a repetition could still be within `MAX_AGE_S`. Further ones are dropped."""
MAX_ANSWER_TOKENS, ANSWER_TOKENS = 4096, 512
"""Most tokens of an answer, and how many it has if the request does not say."""
_MAX_ANSWERED = 4 * MAX_RUNNING
"""Most jobs that run or are being answered with an error. Further ones are dropped."""
CHUNK_CHARACTERS = 2048
MAX_JOB_S = 900.0
_GATHER_S = 0.03
"""Text is gathered for so long before it is sent: a chunk costs the broker a round trip and the device a packet."""
_PUBLISH_S = 60.0
"""A chunk that the broker does not take for so long ends the job."""
_CANCEL_SEQ = 1
_LOOK_S = 1.0
"""How often running jobs are checked: whether their devices' keys are still valid."""


class JobMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message of a chat."""

    role: Annotated[str, Meta(max_length=32)]
    content: Annotated[str, Meta(max_length=REQUEST_BYTES)]


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The text of a request. It has one of `messages`, `prompt` and `resume`."""

    at: Milliseconds
    model: Annotated[str, Meta(max_length=MAX_LABEL)] = ""
    messages: Annotated[tuple[JobMessage, ...], at_most(256)] = ()
    prompt: Annotated[str, Meta(max_length=REQUEST_BYTES)] = ""
    resume: Annotated[str, Meta(pattern=r"\A([0-9a-f]{32})?\Z")] = ""
    """The secret of an answer that another peer has begun: it is sent again from its beginning."""
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_ANSWER_TOKENS)] = ANSWER_TOKENS
    temperature: AskedTemperature | None = None
    top_p: Fraction | None = None
    seed: Seed | None = None
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)], ...], at_most(4)] = ()


_DECODER = msgspec.json.Decoder(JobRequest)
_Key = tuple[str, str]
"""Serial of a device's key, and a job."""


class _NotDelivered(Exception):
    """The broker did not take a chunk, so there is no way to tell the device."""


@dataclass(slots=True)
class _Job:
    device: str
    serial: str
    seal: JobSeal
    topic: str
    salt: bytes
    taken: bool
    """False: it is only answered with an error."""
    task: "asyncio.Task[None] | None" = None
    seq: int = 0
    cancelled: bool = False


@dataclass(slots=True)
class JobServer:
    """Takes the jobs that are sent to this peer."""

    identity: Callable[[], Identity]
    """Returns this peer's present identity: its cluster key changes with a rotation, which ends the keys of all devices."""
    topics: Topics
    broker: Broker
    devices: DeviceList
    coordinator: Coordinator
    clock: Clock
    refused: Counter[str] = field(default_factory=Counter)
    """Number of messages that were dropped, by reason. The reasons are a fixed set."""
    _seen: OrderedDict[_Key, float] = field(default_factory=OrderedDict)
    """Requests that were taken -> when they can be forgotten, in monotonic time, the oldest first."""
    _running: dict[_Key, _Job] = field(default_factory=dict)
    _group: asyncio.TaskGroup | None = None
    _key: Callable[[ClusterKey, str, bytes], bytes] = field(default_factory=lambda: lru_cache(maxsize=64)(ClusterKey.device_key))

    def __len__(self) -> int:
        return len(self._running)

    async def run(self) -> None:
        """Run the jobs, and end those whose device's key is not valid any more. Cancel: they are cancelled."""
        try:
            async with asyncio.TaskGroup() as self._group:
                while True:
                    await self.clock.sleep(_LOOK_S)
                    for job in list(self._running.values()):
                        device = self.devices.valid(job.serial)
                        if device is None or self._secret(device) != job.seal.key:
                            log.info("a job of %s ends: its key was revoked", job.device)
                            self._cancel(job)
        finally:
            self._group = None

    def on_message(self, topic: JobTopic, payload: bytes, since: int) -> None:
        """Handle a message that the broker delivered for a job. `since`: of this peer's present connection."""
        try:
            self._take(topic, payload, since)
        except PeerRefused as error:
            self.refused[error.message] += 1

    def _take(self, topic: JobTopic, payload: bytes, since: int) -> None:
        """Raises: PeerRefused if the message is not of a known device, or not new."""
        if len(payload) > REQUEST_BYTES:
            raise PeerRefused("too long")
        try:
            sealed = read_sealed(payload)
        except PeerRefused:
            raise PeerRefused("malformed") from None
        serial = sealed.salt.hex()
        device = self.devices.valid(serial)
        if device is None or device.name != topic.device:
            raise PeerRefused("unknown device")
        key = serial, topic.job
        running = self._running.get(key)
        seal = running.seal if running is not None else self._seal(device, topic, since)
        try:
            plain = seal.open(Direction.REQUEST, sealed)
        except PeerRefused:
            raise PeerRefused("forged") from None
        if sealed.seq == _CANCEL_SEQ:
            self._cancel(running)
        elif sealed.seq == 0:
            self._begin(key, device, seal, plain)

    def _seal(self, device: MqttDevice, topic: JobTopic, since: int) -> JobSeal:
        secret = self._secret(device)
        if key_check(secret) != device.check:
            raise PeerRefused("unknown device")  # its key is of an earlier cluster key
        return JobSeal(
            key=secret,
            cluster=self.topics.cluster,
            peer=self.identity().peer,
            device=device.name,
            job=topic.job,
            since=since,
        )

    def _secret(self, device: MqttDevice) -> bytes:
        return self._key(self.identity().key, device.name, bytes.fromhex(device.serial))

    def _begin(self, key: _Key, device: MqttDevice, seal: JobSeal, plain: bytes) -> None:
        self._note_seen(key)
        try:
            request = _DECODER.decode(plain)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            failure: MeshdError | None = InvalidRequest(f"the request is wrong: {error}")
            request = JobRequest(at=0)
        else:
            if abs(self.clock.wall() - request.at / 1000) > MAX_AGE_S:
                raise PeerRefused("old")
            failure = self._no_room(device.serial)
        if self._group is None or len(self._running) >= _MAX_ANSWERED:
            raise PeerRefused("too many")
        answer = self.topics.answer(device.name, seal.job)
        job = _Job(device.name, device.serial, seal, answer, self.clock.random_bytes(16), taken=failure is None)
        self._running[key] = job
        job.task = self._group.create_task(self._work(job, request, failure))
        job.task.add_done_callback(lambda _: self._running.pop(key, None))

    def _note_seen(self, key: _Key) -> None:
        """Raises: PeerRefused if the request was seen before, or there are too many to remember."""
        now = self.clock.monotonic()
        while self._seen and next(iter(self._seen.values())) < now:
            self._seen.popitem(last=False)
        if key in self._seen:
            raise PeerRefused("repeated")
        if len(self._seen) >= MAX_SEEN or sum(serial == key[0] for serial, _ in self._seen) >= MAX_SEEN_PER_DEVICE:
            raise PeerRefused("too many")
        self._seen[key] = now + 2 * MAX_AGE_S

    def _no_room(self, serial: str) -> MeshdError | None:
        taken = [job.serial for job in self._running.values() if job.taken]
        if taken.count(serial) >= MAX_PER_DEVICE:
            return Overloaded(f"{MAX_PER_DEVICE} jobs of this device run already")
        if len(taken) >= MAX_RUNNING:
            return Overloaded(f"{MAX_RUNNING} jobs run on this peer already")
        return None

    def _cancel(self, job: _Job | None) -> None:
        if job is not None and job.task is not None:
            job.cancelled = True
            job.task.cancel()

    async def _work(self, job: _Job, request: JobRequest, failure: MeshdError | None) -> None:
        """Answer a job. Never raises: the device gets a message about a failure, if the broker takes it."""
        try:
            try:
                async with asyncio.timeout(MAX_JOB_S):
                    if failure is not None:
                        raise failure
                    await self._answer(job, request)
            except TimeoutError:
                await self._send(job, _error(LocalFault(f"the job took longer than {MAX_JOB_S:.0f} s")))
            except MeshdError as error:
                await self._send(job, _error(error))
        except _NotDelivered as error:
            log.info("a job of %s ends: %s", job.device, error)
        except asyncio.CancelledError:
            if not job.cancelled:
                raise
        except Exception:
            log.exception("a job of %s failed unexpectedly", job.device)

    async def _answer(self, job: _Job, request: JobRequest) -> None:
        if request.resume:
            generation = await self.coordinator.resume(AnswerSecret(request.resume))
        else:
            generation = await self.coordinator.generate(self._generation_request(request))
        known = False
        try:
            await self._send(job, {"answer": generation.secret, "prompt_tokens": generation.prompt_tokens})
            known = True
            await self._send_text(job, generation)
        finally:
            # Else the answer, when it has lost its reader, is suspended, and the device can go on with it here or at another peer.
            if job.cancelled or not known:
                await generation.cancel()

    async def _send_text(self, job: _Job, generation: Generation) -> None:
        """Send the text as it comes, and the end."""
        waiting: list[str] = []
        ended: list[Finished] = []
        news = asyncio.Event()

        async def read() -> None:
            async for event in generation.events():
                if isinstance(event, Finished):
                    ended.append(event)
                else:
                    waiting.append(event.text)
                news.set()

        reading = asyncio.create_task(read())
        reading.add_done_callback(lambda _: news.set())
        try:
            while True:
                await news.wait()
                await self.clock.sleep(_GATHER_S)
                news.clear()
                over = reading.done()
                text = "".join(waiting)
                waiting.clear()
                for at in range(0, len(text), CHUNK_CHARACTERS):
                    await self._send(job, {"text": text[at : at + CHUNK_CHARACTERS]})
                if over:
                    break
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        reading.result()  # raises why the answer was suspended or failed
        last = ended[0]
        tokens = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens}
        await self._send(job, {"end": str(last.reason), **tokens})

    async def _send(self, job: _Job, content: dict[str, Any]) -> None:
        """Seal and publish the next chunk. Raises: _NotDelivered if the broker does not take it."""
        payload = job.seal.seal(Direction.ANSWER, job.seq, job.salt, msgspec.json.encode(content))
        job.seq += 1
        try:
            await self.broker.publish_in(_PUBLISH_S, job.topic, payload)
        except PeerLost as error:
            raise _NotDelivered(error.message) from error

    def _generation_request(self, request: JobRequest) -> GenerationRequest:
        if bool(request.messages) == bool(request.prompt):
            raise InvalidRequest("the request has neither or several of messages, prompt and resume")
        card = self.coordinator.card(request.model)
        wanted = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        recommended = msgspec.to_builtins(card.sampling) if card is not None else {}
        defaults = {name: value for name, value in recommended.items() if value is not None}
        seed = {"seed": int.from_bytes(self.clock.random_bytes(8), "big") >> 1}
        given = {name: value for name, value in wanted.items() if value is not None}
        chat = tuple(ChatMessage(role=message.role, content=message.content) for message in request.messages)
        return GenerationRequest(
            model=request.model,
            prompt=chat or request.prompt,
            sampling=SamplingParams(**(seed | defaults | given)),
            max_tokens=request.max_tokens,
            stop=request.stop,
        )


def _error(error: MeshdError) -> dict[str, Any]:
    return {"error": {"code": error.code, "message": error.message}}
