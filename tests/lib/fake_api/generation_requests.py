"""The requests to the coordinator that bodies of each route become."""

from typing import Any

import msgspec

from meshd.agents.service import GenerationRequest
from meshd.api.http.body import decode_body
from meshd.api.openai.chat.schemas import ChatRequest
from meshd.api.openai.completions.schemas import CompletionRequest
from meshd.api.openai.responses.request import ResponseRequest
from meshd.clock import SystemClock


class FixedClock(SystemClock):
    """Its random numbers have all bits set."""

    def random_bytes(self, count: int) -> bytes:
        return b"\xff" * count


def chat(**fields: Any) -> list[GenerationRequest]:
    """Those of a chat."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]} | fields
    return decode_body(msgspec.json.encode(body), ChatRequest).generation_requests(FixedClock())


def completion(**fields: Any) -> list[GenerationRequest]:
    """Those of a completion."""
    body = {"model": "m", "prompt": "hello"} | fields
    return decode_body(msgspec.json.encode(body), CompletionRequest).generation_requests(FixedClock())


def response(**fields: Any) -> GenerationRequest:
    """That of a response."""
    body = {"model": "m", "input": "hello"} | fields
    [one] = decode_body(msgspec.json.encode(body), ResponseRequest).generation_requests(FixedClock())
    return one
