"""Convert the body of each route to the requests that the coordinator gets."""

from typing import Any

import msgspec

from meshd.agents.service import GenerationRequest
from meshd.api.http.body import decode_body
from meshd.api.openai.chat.schemas import ChatRequest
from meshd.api.openai.completions.schemas import CompletionRequest
from meshd.api.openai.responses.request import ResponseRequest
from meshd.clock import SystemClock
from meshd.types import SamplingDefaults


class FixedClock(SystemClock):
    """A clock whose random bytes have all bits set."""

    def random_bytes(self, count: int) -> bytes:
        return b"\xff" * count


def chat(**fields: Any) -> list[GenerationRequest]:
    """Convert the body of a chat, with these fields changed."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]} | fields
    return decode_body(msgspec.json.encode(body), ChatRequest)[0].generation_requests(FixedClock(), SamplingDefaults())


def completion(**fields: Any) -> list[GenerationRequest]:
    """Convert the body of a text completion, with these fields changed."""
    body = {"model": "m", "prompt": "hello"} | fields
    return decode_body(msgspec.json.encode(body), CompletionRequest)[0].generation_requests(FixedClock(), SamplingDefaults())


def response(**fields: Any) -> GenerationRequest:
    """Convert the body of a response, with these fields changed."""
    body = {"model": "m", "input": "hello"} | fields
    [one] = decode_body(msgspec.json.encode(body), ResponseRequest)[0].generation_requests(FixedClock(), SamplingDefaults())
    return one
