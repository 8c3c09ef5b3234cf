"""The text worker's own side: does one job after the other, within limits that the operating system holds it to.

Whatever a tokenizer, a template or a text makes it do, the process ends at its memory limit (RLIMIT_AS), when its job has used its
processor time (SIGPROF, which nothing catches, so that native code can't outlast it), or when the daemon closes its standard input.
Processor time is the measure, since an honest job may take long on a busy machine.
"""

import os
import resource
import signal
import sys
from array import array
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from meshd.errors import InvalidRequest, MeshdError, ModelFileError
from meshd.models.files.gguf import GgufFile
from meshd.models.text.template import ChatTemplate, template_from_gguf
from meshd.models.text.token_table import IDS
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from meshd.models.text.tokenizer.tokenizer import Tokenizer
from meshd.models.text.worker.messages import (
    LENGTH,
    OUT_OF_MEMORY,
    EncodeChat,
    Encoded,
    EncodeText,
    Failed,
    Job,
    Load,
    Loaded,
    Result,
    decode_job,
    encode_frame,
)

_TRIAL = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True, slots=True)
class _Text:
    tokenizer: Tokenizer
    template: ChatTemplate | None


class Worker:
    """Does jobs. Keeps the tokenizer and template of each model that it loaded."""

    def __init__(self) -> None:
        self._texts: dict[str, _Text] = {}

    def do(self, job: Job) -> Result:
        """Do one job. Returns: Failed if the model's file or the request's text is at fault."""
        try:
            match job:
                case Load():
                    return self._load(job)
                case EncodeText():
                    return _encoded(self._text(job.model).tokenizer.encode(job.text, add_special=True, parse_special=True))
                case EncodeChat():
                    return self._chat(job)
        except MeshdError as error:
            return Failed(
                code=error.code,
                message=error.message,
                hint=error.hint,
                param=error.param if isinstance(error, InvalidRequest) else None,
            )

    def _load(self, job: Load) -> Loaded:
        with GgufFile.open(job.path) if job.path else GgufFile.from_header(job.header) as file:
            tokenizer = tokenizer_from_gguf(file.metadata)
            template = template_from_gguf(file.metadata) if "tokenizer.chat_template" in file.metadata else None
        text = self._texts[job.model] = _Text(tokenizer, template)
        _try(text)
        return Loaded(
            pieces=tokenizer.pieces,
            ends=array(IDS, tokenizer.ends).tobytes(),
            control=array(IDS, sorted(tokenizer.control_ids)).tobytes(),
            leading_space=tokenizer.leading_space,
            chats=template is not None,
            warnings=tokenizer.warnings,
        )

    def _chat(self, job: EncodeChat) -> Encoded:
        text = self._text(job.model)
        if text.template is None:
            raise InvalidRequest("the model has no chat template", param="messages", hint="use /v1/completions with a text prompt")
        return _encoded(text.tokenizer.encode_chat(text.template, job.messages, variables=job.variables))

    def _text(self, model: str) -> _Text:
        text = self._texts.get(model)
        if text is None:
            raise ModelFileError(f"{model} is not loaded in this worker")
        return text


def _try(text: _Text) -> None:
    """Encode a word and a short conversation, so that a model on which that takes for ever is found out before it is offered.

    A template may refuse the conversation by an error of its own.
    """
    text.tokenizer.encode("Hi", add_special=True)
    if text.template is not None:
        with suppress(InvalidRequest):
            text.tokenizer.encode_chat(text.template, _TRIAL)


def _encoded(ids: list[int]) -> Encoded:
    return Encoded(ids=array(IDS, ids).tobytes())


def limit(memory_bytes: int) -> None:
    """Limit this process: memory, no files written, no core dump; the first to go when the machine is out of memory."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS accepts no limit of RLIMIT_AS; the daemon watches the memory there
            resource.setrlimit(what, (most, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def main(memory_bytes: int) -> None:
    """Do jobs until standard input ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a pool of threads would take address space, which is limited
    limit(memory_bytes)
    jobs, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the results
    worker = Worker()
    while (job := _next_job(jobs)) is not None:
        signal.setitimer(signal.ITIMER_PROF, job.cpu_s)
        try:
            frame = encode_frame(worker.do(job))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 0)
        results.write(frame)
        results.flush()


def _next_job(jobs: BinaryIO) -> Job | None:
    """Read the next job. Returns: None when the daemon has closed the pipe."""
    head = jobs.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = jobs.read(length)
    return decode_job(body) if len(body) == length else None
