"""One streamed answer: what `run`, `chat` and `demo` share."""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from meshd.cli.support.client import Daemon, Stream
from meshd.errors import NotReady

READY_WITHIN_S = 600.0
_FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
_MESH_FIELDS = ("stages", "peers", "min_peers", "objective", "context", "mirror")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSummary:
    """What came of a request, as its client saw it."""

    text: str
    finish: str
    plan: str
    """`name:0-12,name:12-30`."""
    predicted_tpot_s: float
    """0: not told."""
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    decode_s: float
    """From the first text to the last."""

    @property
    def tokens_s(self) -> float:
        """Tokens per second after the first; 0 for an answer too short to tell."""
        return (self.completion_tokens - 1) / self.decode_s if self.completion_tokens > 1 and self.decode_s > 0 else 0.0

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{self.completion_tokens} tokens", f"{self.tokens_s:.1f} tokens/s", f"first after {self.ttft_s * 1e3:.0f} ms"]
        if self.predicted_tpot_s > 0:
            parts.append(f"predicted {1 / self.predicted_tpot_s:.1f} tokens/s")
        return ", ".join(parts) + (f"; {self.plan}" if self.plan else "")


def add_sampling(parser: ArgumentParser) -> None:
    """Flags of what OpenAI's API calls by the same names, and of the request's `mesh` object."""
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of the answer at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that make up this share")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--min-p", type=float, metavar="P", help="leave out what is less likely than this share of the likeliest")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this; repeatable")
    parser.add_argument("--stages", metavar="a:0-12,b:12-30", help="which peers compute which layers")
    parser.add_argument("--peers", type=lambda text: text.split(","), metavar="a,b", help="only these peers may take part")
    parser.add_argument("--min-peers", type=int, metavar="N", help="split over at least so many peers")
    parser.add_argument("--objective", choices=("latency", "ttft", "throughput", "energy", "memory"), help="what to plan for")
    parser.add_argument("--context", type=int, metavar="N", help="tokens to reserve memory for")
    parser.add_argument(
        "--mirror", action="store_true", default=None, help="keep a copy of the answer's KV on another peer: a loss costs less time"
    )


def request_of(args: Namespace, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The body of a chat completion; what was not asked for is left to the daemon."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    body: dict[str, Any] = {"model": args.model, "messages": [*system, *messages]}
    body |= {field: getattr(args, field) for field in _FIELDS if getattr(args, field) is not None}
    mesh = {field: getattr(args, field) for field in _MESH_FIELDS if getattr(args, field) is not None}
    return body | ({"mesh": mesh} if mesh else {})


def stream_answer(daemon: Daemon, body: Mapping[str, Any], write: Callable[[str], object]) -> AnswerSummary:
    """Ask, hand each piece of text to `write` as it comes, and tell how it went.

    Waits while the model is still being placed, for READY_WITHIN_S at most. Raises: as `Daemon.stream`.
    """
    give_up = time.monotonic() + READY_WITHIN_S
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    while True:
        asked = time.monotonic()
        try:
            with daemon.stream("/v1/chat/completions", streamed) as stream:
                return _read(stream, write, asked)
        except NotReady as wait:
            if time.monotonic() > give_up:
                raise
            notice(f"{wait.message}; waiting")
            time.sleep(min(max(wait.retry_after_s, 0.2), 10.0))


def _read(stream: Stream, write: Callable[[str], object], asked: float) -> AnswerSummary:
    first = last = 0.0
    pieces: list[str] = []
    finish, usage = "", {"prompt_tokens": 0, "completion_tokens": 0}
    for event in stream.events():
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            finish = choice.get("finish_reason") or finish
            if text := choice.get("delta", {}).get("content"):
                last = time.monotonic()
                first = first or last
                pieces.append(text)
                write(text)
    return AnswerSummary(
        text="".join(pieces),
        finish=finish,
        plan=stream.headers.get("x-meshd-plan", ""),
        predicted_tpot_s=float(stream.headers.get("x-meshd-predicted-tpot-ms") or 0) / 1e3,
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        ttft_s=max(0.0, first - asked),
        decode_s=last - first,
    )


def write_out(text: str) -> None:
    """To standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def notice(text: str) -> None:
    """A line beside the answer, on standard error."""
    print(text, file=sys.stderr, flush=True)
